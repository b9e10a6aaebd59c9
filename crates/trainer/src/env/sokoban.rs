//! Sokoban on a board of six by six, walls around included: push every box onto a target.
//!
//! The prompt shows the four by four squares within the walls, row by row: `.` floor, `#` wall, `o` target, `x` box, `*` box on a
//! target, `@` player, `+` player on a target. The answer is a walk of `U`, `D`, `L` and `R`. Boards are made by pulling boxes away
//! from their targets, so each has a solution; the shortest one is found by searching breadth first.

use std::collections::{BTreeMap, VecDeque};

use chorus_machine::Rng;

use super::{Environment, Task};

/// Squares on a side, within the walls.
const SIDE: usize = 4;
const SQUARES: usize = SIDE * SIDE;
const MAX_BOXES: u32 = 2;
/// Pulls by which a board is made.
const PULLS: u32 = 60;
/// Moves of the shortest solution: more than trivial, and short enough for an answer.
const SOLUTION: std::ops::RangeInclusive<usize> = 3..=18;
/// Moves that are looked at in an answer.
const MAX_MOVES: usize = 30;
/// Boards that are drawn before one with such a solution is found. About one in two has.
const MAX_DRAWS: u32 = 1_000;
/// What a walk earns that leaves some boxes off their targets, if all the others are on theirs.
const PARTIAL: f32 = 0.2;

const MOVES: [(char, isize, isize); 4] = [('U', -1, 0), ('D', 1, 0), ('L', 0, -1), ('R', 0, 1)];

/// Boards with one or two boxes.
#[derive(Clone, Copy, Debug)]
pub struct Sokoban {
    boxes: u32,
}

/// What does not move.
#[derive(Clone, Copy, Debug)]
struct Ground {
    walls: u16,
    targets: u16,
}

/// What moves. Sets of squares are bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    player: usize,
    boxes: u16,
}

fn neighbour(square: usize, (_, down, right): (char, isize, isize)) -> Option<usize> {
    let row = (square / SIDE).checked_add_signed(down).filter(|row| *row < SIDE)?;
    let column = (square % SIDE).checked_add_signed(right).filter(|column| *column < SIDE)?;
    Some(row * SIDE + column)
}

fn has(set: u16, square: usize) -> bool {
    set >> square & 1 == 1
}

impl Ground {
    fn is_solved(self, state: State) -> bool {
        state.boxes == self.targets
    }

    /// Returns where a step leads, which may push a box; `None` when it leads nowhere.
    fn step(self, state: State, way: (char, isize, isize)) -> Option<State> {
        let player = neighbour(state.player, way).filter(|square| !has(self.walls, *square))?;
        if !has(state.boxes, player) {
            return Some(State { player, ..state });
        }
        let pushed = neighbour(player, way).filter(|square| !has(self.walls | state.boxes, *square))?;
        Some(State { player, boxes: state.boxes & !(1 << player) | 1 << pushed })
    }

    /// Returns the state before a step in this direction, with a box pulled along if one is behind the player.
    fn pull(self, state: State, way: (char, isize, isize)) -> Option<State> {
        let back = (way.0, -way.1, -way.2);
        let player = neighbour(state.player, back).filter(|square| !has(self.walls | state.boxes, *square))?;
        let boxes = match neighbour(state.player, way).filter(|square| has(state.boxes, *square)) {
            Some(pulled) => state.boxes & !(1 << pulled) | 1 << state.player,
            None => state.boxes,
        };
        Some(State { player, boxes })
    }

    fn shortest(self, start: State) -> Option<String> {
        let mut from: BTreeMap<State, (State, char)> = BTreeMap::new();
        let mut queue = VecDeque::from([start]);
        while let Some(state) = queue.pop_front() {
            if self.is_solved(state) {
                let mut walk = String::new();
                let mut at = state;
                while at != start {
                    let (before, way) = from[&at];
                    walk.insert(0, way);
                    at = before;
                }
                return Some(walk);
            }
            for way in MOVES {
                let Some(next) = self.step(state, way).filter(|next| *next != start) else { continue };
                from.entry(next).or_insert_with(|| {
                    queue.push_back(next);
                    (state, way.0)
                });
            }
        }
        None
    }

    fn draw(boxes: u32, rng: &mut Rng) -> (Self, State) {
        let mut squares: Vec<usize> = (0..SQUARES).collect();
        rng.shuffle(&mut squares);
        let mut take = |count: usize| squares.drain(..count).fold(0_u16, |set, square| set | 1 << square);
        let targets = take(boxes as usize);
        let walls = take(usize::try_from(rng.below(3)).unwrap_or(0));
        let ground = Self { walls, targets };
        let mut state = State { player: squares[0], boxes: targets };
        for _ in 0..PULLS {
            let way = MOVES[usize::try_from(rng.below(4)).unwrap_or(0)];
            state = ground.pull(state, way).unwrap_or(state);
        }
        (ground, state)
    }

    fn show(self, state: State) -> String {
        let square = |at: usize| match (has(self.targets, at), has(state.boxes, at), state.player == at) {
            (true, true, _) => '*',
            (false, true, _) => 'x',
            (true, _, true) => '+',
            (false, _, true) => '@',
            (true, ..) => 'o',
            (false, ..) if has(self.walls, at) => '#',
            (false, ..) => '.',
        };
        (0..SQUARES).map(square).collect::<Vec<_>>().chunks(SIDE).map(String::from_iter).collect::<Vec<_>>().join("/")
    }
}

impl Sokoban {
    /// Makes the environment; `None` when there are not one or two boxes.
    #[must_use]
    pub fn new(boxes: u32) -> Option<Self> {
        (1..=MAX_BOXES).contains(&boxes).then_some(Self { boxes })
    }

    fn board(&self, seed: u64) -> (Ground, State, String) {
        let mut rng = Rng::from_u64(seed);
        for _ in 0..MAX_DRAWS {
            let (ground, state) = Ground::draw(self.boxes, &mut rng);
            if let Some(walk) = ground.shortest(state).filter(|walk| SOLUTION.contains(&walk.len())) {
                return (ground, state, walk);
            }
        }
        // One push to the right, solved by one move: not reached in practice.
        let ground = Ground { walls: 0, targets: 1 << 2 };
        (ground, State { player: 0, boxes: 1 << 1 }, "R".to_owned())
    }
}

impl Environment for Sokoban {
    fn name(&self) -> String {
        format!("sokoban-{}", self.boxes)
    }

    fn task(&self, seed: u64) -> Task {
        let (ground, state, solution) = self.board(seed);
        Task { seed, prompt: format!("{}>", ground.show(state)), solution }
    }

    fn reward(&self, task: &Task, answer: &str) -> f32 {
        let (ground, start, _) = self.board(task.seed);
        let mut state = start;
        for letter in answer.trim().chars().take(MAX_MOVES) {
            let Some(way) = MOVES.into_iter().find(|way| way.0 == letter) else { return 0.0 };
            state = ground.step(state, way).unwrap_or(state);
            if ground.is_solved(state) {
                return 1.0;
            }
        }
        let placed = |state: State| (state.boxes & ground.targets).count_ones();
        if placed(state) > placed(start) { PARTIAL } else { 0.0 }
    }

    fn max_tokens(&self) -> usize {
        SOLUTION.end() + 2
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn boards_are_solvable_and_not_trivial() {
        for boxes in 1..=MAX_BOXES {
            let environment = Sokoban::new(boxes).unwrap();
            for seed in 0..100 {
                let (ground, state, walk) = environment.board(seed);
                assert_eq!((state.boxes.count_ones(), ground.targets.count_ones()), (boxes, boxes));
                assert_eq!(state.boxes & ground.walls, 0);
                assert!(SOLUTION.contains(&walk.len()), "{walk}");
            }
        }
    }

    #[test]
    fn a_box_is_pushed_and_walls_stop_it() {
        let ground = Ground { walls: 1 << 3, targets: 1 << 2 };
        let start = State { player: 0, boxes: 1 << 1 };
        assert_eq!(ground.show(start), "@xo#/..../..../....");
        let pushed = ground.step(start, MOVES[3]).unwrap();
        assert!(ground.is_solved(pushed));
        assert_eq!(ground.step(pushed, MOVES[3]), None, "a wall is behind the box");
        assert_eq!(ground.step(start, MOVES[0]), None, "the edge is a wall");
        assert_eq!(ground.shortest(start).unwrap(), "R");
    }
}
