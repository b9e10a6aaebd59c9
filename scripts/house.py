#!/usr/bin/env python3
"""The rules of the house that a compiler does not know: arrows between crates, file sizes, pure crates.

Fails with one line a breach. The arrows are those of the picture in README.md: a crate may depend on what stands below it and
on nothing beside it.
"""
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PURE = {"protocol", "machine", "ledger", "beacon", "rollout", "scheduler", "core"}

# Who may depend on whom, inside the house.
ARROWS = {
    "protocol": set(),
    "machine": {"protocol"},
    "ledger": {"protocol", "machine"},
    "beacon": {"protocol", "machine"},
    # Rollouts and weights: what goes over the bulk plane, beside the counter.
    "rollout": {"protocol", "machine"},
    # Strategies are customers of the beacon's counter: they hand in jobs and get results.
    "scheduler": {"protocol", "machine", "beacon"},
    "core": {"protocol", "machine", "ledger", "beacon", "scheduler"},
    "net": {"protocol"},
    "store": {"protocol"},
    "engine": {"protocol"},
    "api": {"protocol", "core"},
    "trainer": {"protocol", "machine", "rollout"},
    "sim": {"protocol", "machine", "core", "ledger", "beacon", "rollout", "scheduler"},
    "node": {"protocol", "machine", "core", "rollout", "net", "store", "engine", "trainer", "api"},
    "tests": {"protocol", "machine", "core", "net", "store", "engine", "trainer", "api", "ledger", "beacon", "scheduler"},
}
# What lies outside the house and must not come into a pure crate, and whose types stop where.
IMPURE = {"tokio", "libp2p", "quinn", "rocksdb", "mistralrs", "candle-core", "axum", "reqwest", "rand", "getrandom", "mio"}
ONLY_IN = {
    "bincode": {"protocol"},
    "libp2p": {"net"},
    "libp2p-stream": {"net"},
    "quinn": {"net"},
    "rocksdb": {"store"},
    "mistralrs": {"engine", "trainer"},
    "candle-core": {"engine", "trainer"},
    "candle-nn": {"engine", "trainer"},
    "candle-transformers": {"engine", "trainer"},
    "axum": {"api"},
    "clap": {"node", "sim"},
}
IMPURE_CALLS = re.compile(r"\b(Instant::now|SystemTime::now|thread_rng|OsRng|HashMap|HashSet|std::env|std::net|std::fs|std::thread)\b")
MAX_LINES = 600
MAX_PACKAGES = 860


def short(name: str) -> str:
    return name.removeprefix("chorus-")


def arrows(metadata: dict) -> list[str]:
    breaches = []
    for package in metadata["packages"]:
        if not package["name"].startswith("chorus-"):
            continue
        me = short(package["name"])
        if me not in ARROWS:
            breaches.append(f"{package['name']}: not in the house's plan; add it to ARROWS with its reason")
            continue
        for dependency in package["dependencies"]:
            name, dev = dependency["name"], dependency["kind"] == "dev"
            if name.startswith("chorus-"):
                if short(name) not in ARROWS[me] and not dev:
                    breaches.append(f"{package['name']} -> {name}: no such arrow")
            elif name in ONLY_IN and me not in ONLY_IN[name] | {"tests"} and not dev:
                breaches.append(f"{package['name']} -> {name}: belongs in {', '.join(sorted(ONLY_IN[name]))} alone")
            elif me in PURE and name in IMPURE and not dev:
                breaches.append(f"{package['name']} -> {name}: a pure crate does no IO")
    if len(metadata["packages"]) > MAX_PACKAGES:
        breaches.append(f"{len(metadata['packages'])} packages in Cargo.lock are more than {MAX_PACKAGES}")
    return breaches


def sources() -> list[str]:
    breaches = []
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.rs"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.split():
        path = ROOT / name
        if not path.exists():
            continue
        shipped = path.read_text().split("#[cfg(test)]\nmod tests {")[0]
        is_test = "/tests/" in name or name.startswith("tests/") or name.endswith("tests.rs")
        count = shipped.count("\n")
        if count > MAX_LINES and not is_test:
            breaches.append(f"{name}: {count} lines before its tests; past {MAX_LINES} it has two subjects")
        parts = pathlib.PurePath(name).parts
        crate = parts[1] if parts[0] == "crates" else parts[0]
        if crate in PURE and not is_test and "src" in parts:
            for number, line in enumerate(shipped.splitlines(), 1):
                code = line.split("//")[0]
                if IMPURE_CALLS.search(code):
                    breaches.append(f"{name}:{number}: a pure crate takes time, randomness and order from its caller: {line.strip()}")
        if re.search(r"\b(TODO|FIXME|XXX)\b|\btodo!\(|unimplemented!\(", shipped):
            breaches.append(f"{name}: holds unfinished work")
    main = ROOT / "node/src/main.rs"
    if main.exists() and main.read_text().count("\n") > 80:
        breaches.append("node/src/main.rs: longer than 80 lines")
    return breaches


def main() -> int:
    raw = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    breaches = arrows(json.loads(raw.stdout)) + sources()
    for breach in breaches:
        print(f"breach: {breach}", file=sys.stderr)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
