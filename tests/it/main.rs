//! Whole processes over real sockets, disks and models: one binary, so that everything heavy is linked once.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod accusation;
mod answers;
mod api;
mod faults;
mod input;
mod model;
mod namespaces;
mod survival;
mod training;
mod weight;

/// A file that nobody listed above would be a test that never runs.
#[test]
fn no_test_file_is_forgotten() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/it");
    let main = include_str!("main.rs");
    for file in std::fs::read_dir(dir).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let module = name.trim_end_matches(".rs");
        assert!(module == "main" || main.contains(&format!("mod {module};")), "{name} is not listed in main.rs");
    }
}
