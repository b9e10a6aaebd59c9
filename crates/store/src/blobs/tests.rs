//! Large values, on a disk that is treated badly.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use proptest::prelude::*;

use super::files::MAX_FREE_BYTES;
use super::*;

const LARGE: usize = 256 << 10;

fn open(path: &Path) -> Blobs {
    Blobs::open(path, &"test".parse().unwrap(), "frames").unwrap()
}

/// Bytes that tell whose they are.
fn value(seed: u32, len: usize) -> Vec<u8> {
    let mut left = seed;
    let mut next = || {
        left = left.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        left.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

fn pair(n: u32, len: usize) -> Pair {
    (n.to_be_bytes().to_vec(), value(n, len))
}

/// To be written: each value in two parts.
fn new(pairs: impl IntoIterator<Item = Pair>) -> Vec<(Vec<u8>, Parts)> {
    let parts = |(key, value): Pair| {
        let (head, rest) = value.split_at(value.len() / 3);
        (key, vec![head.into(), rest.into()])
    };
    pairs.into_iter().map(parts).collect()
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(path.join(DIRECTORY)).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_puts_deletes_failures_and_reopenings_leave_what_a_map_would_hold(
        steps in proptest::collection::vec(
            (proptest::collection::vec((0u32..12, any::<bool>(), 0usize..3 * LARGE_BYTES), 0..6), 0u8..8),
            1..16,
        )
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut blobs = open(dir.path());
        let mut model = BTreeMap::new();
        for (round, (changes, then)) in (0u32..).zip(steps) {
            let (mut puts, mut deletes) = (BTreeMap::new(), BTreeSet::new());
            for (key, add, len) in changes {
                let name = key.to_be_bytes().to_vec();
                if add {
                    puts.insert(name, value(round * 100 + key, len));
                } else {
                    deletes.insert(name);
                }
            }
            model.extend(puts.clone());
            blobs.put(new(puts)).unwrap();
            model.retain(|key, _| !deletes.contains(key));
            blobs.delete(deletes.into_iter().collect()).unwrap();
            match then {
                0 => {
                    drop(blobs);
                    blobs = open(dir.path());
                }
                1 => blobs.forget(),
                _ => {}
            }
            prop_assert_eq!(blobs.all().unwrap(), model.clone().into_iter().collect::<Vec<_>>());
        }
        for (key, value) in &model {
            let found = blobs.get(key).unwrap();
            prop_assert_eq!(found.as_ref(), Some(value));
        }
    }
}

#[test]
fn what_is_deleted_leaves_little_room_behind() {
    const LIVE: u32 = 16;
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path());
    for n in 0..400 {
        blobs.put(new([pair(n, LARGE)])).unwrap();
        blobs.delete(n.checked_sub(LIVE).map(|old| old.to_be_bytes().to_vec()).into_iter().collect()).unwrap();
    }
    assert!(files(dir.path()).len() <= LIVE as usize + 2, "{:?}", files(dir.path()));
    // Many at once are deleted at once: what is kept to be written over has a bound.
    let many = (0..2 * MAX_FREE_BYTES / LARGE as u64).map(|n| n as u32 + 1_000);
    for n in many.clone() {
        blobs.put(new([pair(n, LARGE)])).unwrap();
    }
    blobs.delete(many.map(|n| n.to_be_bytes().to_vec()).collect()).unwrap();
    blobs.put(new([pair(9_999, LARGE)])).unwrap();
    let bytes: u64 = files(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!(bytes < MAX_FREE_BYTES + u64::from(LIVE + 2) * LARGE as u64, "{bytes} bytes");
}

#[test]
fn a_file_that_held_many_values_does_not_keep_their_room_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path());
    blobs.put(new((0..64).map(|n| pair(n, LARGE)))).unwrap();
    blobs.delete((0..64u32).map(|n| n.to_be_bytes().to_vec()).collect()).unwrap();
    for n in 100..104 {
        blobs.put(new([pair(n, LARGE)])).unwrap();
    }
    let bytes: u64 = files(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert_eq!(bytes, 4 * LARGE as u64);
    assert_eq!(blobs.all().unwrap(), (100..104).map(|n| pair(n, LARGE)).collect::<Vec<_>>());
}

#[test]
fn a_file_is_written_over_only_when_the_disk_knows_that_nothing_lies_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path());
    blobs.put(new([pair(1, LARGE)])).unwrap();
    let first = fs::read(&files(dir.path())[0]).unwrap();
    blobs.delete(vec![1u32.to_be_bytes().to_vec()]).unwrap();
    // The deletion is not synced, so what was deleted could come back until this is done.
    blobs.put(new([pair(2, LARGE)])).unwrap();
    assert_eq!(files(dir.path()).len(), 2);
    assert_eq!(fs::read(&files(dir.path())[0]).unwrap(), first);
    blobs.put(new([pair(3, LARGE)])).unwrap();
    assert_eq!(files(dir.path()).len(), 2);
    assert_eq!(fs::read(&files(dir.path())[0]).unwrap(), value(3, LARGE));
    // Nor does a restart know whether it was.
    blobs.delete(vec![3u32.to_be_bytes().to_vec()]).unwrap();
    drop(blobs);
    open(dir.path()).put(new([pair(4, LARGE)])).unwrap();
    assert_eq!(files(dir.path()).len(), 3);
}

#[test]
fn a_value_whose_file_is_cut_or_gone_is_left_out_and_the_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path());
    for n in 1..=3 {
        blobs.put(new([pair(n, LARGE)])).unwrap();
    }
    fs::remove_file(&files(dir.path())[0]).unwrap();
    File::options().write(true).open(&files(dir.path())[0]).unwrap().set_len(LARGE as u64 - 1).unwrap();
    drop(blobs);
    let blobs = open(dir.path());
    assert_eq!(blobs.all().unwrap(), vec![pair(3, LARGE)]);
    assert!(matches!(blobs.get(&1u32.to_be_bytes()), Err(StoreError::Corrupt { .. })));
}

#[test]
fn what_was_staged_before_a_write_failed_is_refused_and_can_be_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path());
    blobs.put(new([pair(1, LARGE)])).unwrap();
    let staged = blobs.stage(new([pair(2, LARGE), pair(3, 10)])).unwrap();
    assert_eq!(blobs.all().unwrap(), vec![pair(1, LARGE)], "not there before it is committed");
    // As any failed write does.
    blobs.forget();
    let error = blobs.commit(staged).unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(blobs.all().unwrap(), vec![pair(1, LARGE)]);
    blobs.put(new([pair(2, LARGE), pair(3, 10)])).unwrap();
    // The file that was written in vain is not used by two.
    blobs.put(new([pair(4, LARGE)])).unwrap();
    blobs.put(new([pair(5, LARGE)])).unwrap();
    let want = vec![pair(1, LARGE), pair(2, LARGE), pair(3, 10), pair(4, LARGE), pair(5, LARGE)];
    assert_eq!(blobs.all().unwrap(), want);
}

#[test]
fn a_committer_answers_in_order_and_finishes_when_it_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = open(dir.path());
    let (told, answers) = std::sync::mpsc::channel();
    let committer = Committer::spawn(blobs.clone(), move |n, result| told.send((n, result)).unwrap()).unwrap();
    for n in 0..8 {
        committer.commit(n, blobs.stage(new([pair(n, LARGE)])).unwrap());
    }
    drop(committer);
    assert_eq!(answers.iter().collect::<Vec<_>>(), (0..8).map(|n| (n, Ok(()))).collect::<Vec<_>>());
    assert_eq!(blobs.all().unwrap(), (0..8).map(|n| pair(n, LARGE)).collect::<Vec<_>>());
}
