//! The learning curve: as a table, as CSV, as a picture.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Columns and rows of the curve on a terminal.
const TEXT: (usize, usize) = (72, 12);
/// Size of the picture in pixels, and the margins left of and below the curve.
const PICTURE: (f64, f64) = (640.0, 320.0);
const MARGIN: f64 = 44.0;

/// One moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps taken.
    pub step: u64,
    /// Seconds since the run began.
    pub seconds: f64,
    /// Mean reward of the rollouts of this step.
    pub reward: f32,
    /// Mean reward over held-out tasks, where it was measured.
    pub held_out: Option<f32>,
    /// Share of groups from which something could be learned.
    pub useful: f32,
    /// The gradient's length before it was clipped.
    pub gradient: f64,
    /// Mean importance weight, before it was truncated; 1 when rollouts are fresh and the sampler computes as the learner does.
    pub importance: f32,
}

/// A run's points, oldest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve(pub Vec<Point>);

impl Curve {
    /// Returns the curve as CSV with a header.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let mut csv = "step,seconds,reward,held_out,useful,gradient,importance\n".to_owned();
        for p in &self.0 {
            let held_out = p.held_out.map_or_else(String::new, |reward| format!("{reward:.4}"));
            let _infallible = writeln!(
                csv,
                "{},{:.2},{:.4},{held_out},{:.3},{:.4},{:.4}",
                p.step, p.seconds, p.reward, p.useful, p.gradient, p.importance
            );
        }
        csv
    }

    /// Where held-out rewards were measured: (seconds, reward).
    fn held_out(&self) -> Vec<(f64, f64)> {
        self.0.iter().filter_map(|p| Some((p.seconds, f64::from(p.held_out?)))).collect()
    }

    fn end(&self) -> f64 {
        self.0.last().map_or(1.0, |p| p.seconds).max(1e-9)
    }

    /// Returns the held-out reward over time for a terminal.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "columns and rows of a terminal"
    )]
    pub fn to_text(&self) -> String {
        let (columns, rows) = TEXT;
        let mut grid = vec![vec![' '; columns]; rows];
        for (seconds, reward) in self.held_out() {
            let column = ((seconds / self.end() * (columns - 1) as f64).round() as usize).min(columns - 1);
            let row = ((1.0 - reward.clamp(0.0, 1.0)) * (rows - 1) as f64).round() as usize;
            grid[row.min(rows - 1)][column] = '•';
        }
        let mut text = String::new();
        for (row, line) in grid.iter().enumerate() {
            let label = 1.0 - row as f64 / (rows - 1) as f64;
            let line: String = line.iter().collect();
            let _infallible = writeln!(text, "{label:>5.2} │{}", line.trim_end());
        }
        let _infallible = writeln!(text, "      └{}", "─".repeat(columns));
        let _infallible = writeln!(text, "       0 s{:>width$.0} s", self.end(), width = columns - 5);
        text
    }

    /// Returns a picture of the reward over time: each step's rollouts as dots, held-out tasks as a line.
    #[must_use]
    pub fn to_svg(&self, title: &str) -> String {
        let (width, height) = PICTURE;
        let x = |seconds: f64| MARGIN + seconds / self.end() * (width - MARGIN - 12.0);
        let y = |reward: f64| 28.0 + (1.0 - reward.clamp(0.0, 1.0)) * (height - MARGIN - 28.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{MARGIN}\" y=\"18\">{}</text>\n",
            escape(title)
        );
        for reward in [0.0, 0.25, 0.5, 0.75, 1.0] {
            let at = y(reward);
            let _infallible = writeln!(
                svg,
                "<path d=\"M{MARGIN} {at:.1}H{:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{reward}</text>",
                width - 12.0,
                MARGIN - 6.0,
                at + 4.0
            );
        }
        for p in &self.0 {
            let (cx, cy) = (x(p.seconds), y(p.reward.into()));
            let _infallible = writeln!(svg, "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"1.5\" fill=\"#9bc\"/>");
        }
        let line: Vec<String> =
            self.held_out().into_iter().map(|(s, reward)| format!("{:.1},{:.1}", x(s), y(reward))).collect();
        let _infallible = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#c33\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0} s; dots: rollouts, line: held-out tasks</text>\n</svg>",
            line.join(" "),
            width - 12.0,
            height - 14.0,
            self.end()
        );
        svg
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> Curve {
        let point = |step: u32| Point {
            step: step.into(),
            seconds: f64::from(step) * 2.0,
            reward: 0.1 * step as f32,
            held_out: (step % 2 == 0).then_some(0.1 * step as f32),
            useful: 0.5,
            gradient: 1.0,
            importance: 1.0,
        };
        Curve((0..=10).map(point).collect())
    }

    #[test]
    fn a_table_has_a_line_a_step_and_gaps_where_nothing_was_measured() {
        let csv = curve().to_csv();
        assert_eq!(csv.lines().count(), 12);
        assert_eq!(csv.lines().nth(2), Some("1,2.00,0.1000,,0.500,1.0000,1.0000"));
        assert_eq!(csv.lines().nth(3), Some("2,4.00,0.2000,0.2000,0.500,1.0000,1.0000"));
    }

    #[test]
    fn a_rising_curve_rises_on_the_terminal_and_in_the_picture() {
        let text = curve().to_text();
        let columns: Vec<usize> = text.lines().filter_map(|line| line.chars().position(|c| c == '•')).collect();
        assert_eq!(columns.len(), 6, "{text}");
        assert!(columns.windows(2).all(|pair| pair[0] > pair[1]), "the top line is the latest: {text}");
        let svg = curve().to_svg("a < b");
        assert!(svg.contains("a &lt; b") && svg.matches("<circle").count() == 11 && svg.ends_with("</svg>\n"));
        assert!(Curve::default().to_svg("").contains("polyline"), "an empty curve is a picture too");
    }
}
