//! `chorus ask`: hands a task in, shows the elections and the vote as they happen, then the answer and what it is worth.
//!
//! What happens goes to standard error, the answer to standard output, so that it can be piped on.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};

use serde_json::{Value, json};

use super::block_on;
use crate::client::ApiClient;
use crate::config::Config;
use crate::error::CommandError;

/// Times a broken event stream is resumed before giving up.
const MAX_RESUMES: u32 = 3;

#[derive(Debug, clap::Args)]
pub(crate) struct AskArgs {
    /// The question
    question: String,
    /// How it is run
    #[arg(long, value_parser = ["direct", "chains"], default_value = "chains")]
    strategy: String,
    /// Independent decompositions, for the strategy `chains`
    #[arg(long, default_value_t = 3)]
    planners: u8,
    /// What a chain weighs in the vote: how well its executors match, or how well they have done
    #[arg(long, value_parser = ["match_score", "calibrated"], default_value = "match_score")]
    weighting: String,
    /// How much harm a wrong answer does; at high risk a narrow vote is widened
    #[arg(long, value_parser = ["low", "medium", "high"], default_value = "low")]
    risk: String,
    /// Seconds it may take
    #[arg(long, default_value_t = 180)]
    deadline: u64,
    /// The most tokens of an answer
    #[arg(long, default_value_t = 256)]
    max_tokens: u32,
    /// Sampling temperature of the answers
    #[arg(long, default_value_t = 0.5)]
    temperature: f32,
    /// The seed that every draw comes from: same seed, same executors, same tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A model that every executor must run
    // Not `model`, which is the name of the flag for a node's own model: clap would take one for the other.
    #[arg(long, value_name = "MODEL")]
    with_model: Option<String>,
    /// Print only the answer
    #[arg(long, short)]
    quiet: bool,
    /// Print the whole result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn ask(config: &Config, args: &AskArgs) -> Result<(), CommandError> {
    block_on(run(config, args))
}

async fn run(config: &Config, args: &AskArgs) -> Result<(), CommandError> {
    let api = ApiClient::new(config)?;
    let names = names(&api).await;
    let accepted = api.post("/v1/tasks", &body(args)).await?;
    let id = accepted["id"].as_str().unwrap_or_default().to_owned();
    let path = format!("/v1/tasks/{id}/events");
    let mut screen = Screen::new(names, args.quiet || args.json);
    let mut last: Option<String> = None;
    let mut outcome = None;
    for _ in 0..=MAX_RESUMES {
        let behind = last.clone();
        let follow = api.events(&path, behind.as_deref(), |event| {
            if event.id.is_some() {
                last = event.id;
            }
            outcome = screen.show(&event.data);
            outcome.is_none()
        });
        tokio::select! {
            followed = follow => {
                if outcome.is_some() {
                    break;
                }
                followed.map_err(|error| error.hint(goes_on(&id)))?;
            }
            _ = tokio::signal::ctrl_c() => {
                api.delete(&format!("/v1/tasks/{id}")).await?;
                return Err(CommandError::failed("cancelled"));
            }
        }
    }
    match outcome {
        Some(Outcome::Answer(result)) => {
            print_answer(&screen, &result, args);
            Ok(())
        }
        Some(Outcome::Error(message)) => Err(CommandError::failed(message)),
        None => Err(CommandError::failed("the node ended the event stream before the task ended").hint(goes_on(&id))),
    }
}

/// What becomes of a task whose events no longer come.
fn goes_on(id: &str) -> String {
    format!("the task goes on, also after a restart of the node: its answer will be at GET /v1/tasks/{id}")
}

fn body(args: &AskArgs) -> Value {
    json!({
        "question": args.question,
        "strategy": args.strategy,
        "planners": args.planners,
        "weighting": args.weighting,
        "risk": args.risk,
        "deadline_s": args.deadline,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "model": args.with_model,
    })
}

/// Names of the nodes that the ledger knows, by id.
async fn names(api: &ApiClient) -> BTreeMap<String, String> {
    let Ok(status) = api.get("/v1/status").await else { return BTreeMap::new() };
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    let pair = |node: &Value| Some((node["node"].as_str()?.to_owned(), node["name"].as_str()?.to_owned()));
    nodes.iter().filter_map(pair).filter(|(_, name)| !name.is_empty()).collect()
}

enum Outcome {
    Answer(Value),
    Error(String),
}

/// The lines on standard error.
struct Screen {
    names: BTreeMap<String, String>,
    silent: bool,
    colour: bool,
}

impl Screen {
    fn new(names: BTreeMap<String, String>, silent: bool) -> Self {
        Self { names, silent, colour: stderr().is_terminal() }
    }

    fn name(&self, node: &Value) -> String {
        let id = node.as_str().unwrap_or("?");
        let tail = id.strip_prefix("did:key:z6Mk").unwrap_or(id);
        let short = tail.get(..8).unwrap_or(tail);
        self.names.get(id).map_or_else(|| short.to_owned(), |name| one_line(name))
    }

    fn line(&self, event: &Value, place: &str, text: &str) {
        if self.silent {
            return;
        }
        let seconds = event["elapsed_ms"].as_f64().unwrap_or(0.0) / 1_000.0;
        let (dim, bold, off) = if self.colour { ("\x1b[2m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        eprintln!("{dim}{seconds:7.2}s{off}  {bold}{place:<14}{off} {text}");
    }

    /// Shows one event. Returns the outcome if it was the last.
    fn show(&mut self, event: &Value) -> Option<Outcome> {
        let place = place(event);
        let node = || self.name(&event["node"]);
        let text = match event["event"].as_str().unwrap_or_default() {
            "accepted" => accepted(event),
            "announced" => format!("announced; {} nodes can do it", event["candidates"]),
            "bid" => format!("{} bids, match {:.3}", node(), number(&event["score"])),
            "elected" => self.elected(event),
            "lost" => format!("{} is lost: {}", node(), plain(&event["reason"])),
            "waiting" => format!("waits: {}", plain(&event["reason"])),
            "planned" => return self.planned(event),
            "plan_rejected" => format!("plan rejected ({}); next: {}", plain(&event["reason"]), plain(&event["then"])),
            "subtask_done" => format!(
                "{} is done: {} tokens in {:.2}s: {}",
                node(),
                event["tokens"],
                number(&event["took_ms"]) / 1_000.0,
                one_line(plain(&event["result"]))
            ),
            "chain_done" => chain_done(event),
            "widened" => format!("{} more chains: {}", event["chains"], plain(&event["reason"])),
            "voted" => voted(event),
            "finished" => return Some(Outcome::Answer(event["result"].clone())),
            "failed" => return Some(Outcome::Error(failure(&event["error"]))),
            _ => return None,
        };
        self.line(event, &place, &text);
        None
    }

    fn elected(&self, event: &Value) -> String {
        let hedge = if event["hedge"].as_bool() == Some(true) { " as a hedge" } else { "" };
        format!(
            "{} is elected{hedge} of {} bids, match {:.3}",
            self.name(&event["node"]),
            event["bids"],
            number(&event["score"]),
        )
    }

    fn planned(&self, event: &Value) -> Option<Outcome> {
        self.line(event, &place(event), &format!("plan of {}:", self.name(&event["planner"])));
        for (index, step) in event["steps"].as_array().into_iter().flatten().enumerate() {
            self.line(
                event,
                "",
                &format!("  {}. {} ({})", index + 1, one_line(plain(&step["ask"])), plain(&step["skill"])),
            );
        }
        None
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// Where in the task something happened: the chain, counted from 1, and its stage.
fn place(event: &Value) -> String {
    let Some(chain) = event["chain"].as_u64() else { return String::new() };
    match (event["stage"].as_str(), event["step"].as_u64()) {
        (Some("step"), Some(step)) => format!("chain {} step {step}", chain + 1),
        (Some(stage), _) => format!("chain {} {stage}", chain + 1),
        (None, _) => format!("chain {}", chain + 1),
    }
}

fn accepted(event: &Value) -> String {
    let fallback = event["fallback"].as_str().map(|why| format!(" ({why})")).unwrap_or_default();
    match event["strategy"].as_str() {
        Some("chains") => format!("accepted: {} independent chains, then a vote{fallback}", event["chains"]),
        strategy => format!("accepted: {}{fallback}", strategy.unwrap_or("?")),
    }
}

fn chain_done(event: &Value) -> String {
    match event["answer"].as_str() {
        Some(answer) => format!("answers {} with weight {:.3}", one_line(answer), number(&event["weight"])),
        None => format!("has no answer: {}", plain(&event["error"])),
    }
}

fn voted(event: &Value) -> String {
    let shares: Vec<String> = event["votes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|vote| format!("{} ({:.3})", one_line(plain(&vote["answer"])), number(&vote["weight"])))
        .collect();
    format!("vote: {}", shares.join("  against  "))
}

fn failure(error: &Value) -> String {
    error["message"].as_str().or_else(|| error.as_str()).map_or_else(|| error.to_string(), str::to_owned)
}

/// One line of what a model or a peer wrote: cut, and without anything that moves a terminal's cursor.
fn one_line(text: &str) -> String {
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ").replace(char::is_control, "?");
    match flat.char_indices().nth(100) {
        Some((end, _)) => format!("{}…", &flat[..end]),
        None => flat,
    }
}

fn print_answer(screen: &Screen, result: &Value, args: &AskArgs) {
    if args.json {
        println!("{result:#}");
        return;
    }
    if !args.quiet {
        eprintln!();
    }
    let visible = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    println!("{}", answer_of(result, args).chars().map(visible).collect::<String>());
    if args.quiet {
        return;
    }
    eprintln!();
    let doubt = match (result["tie"].as_bool(), result["low_margin"].as_bool()) {
        (Some(true), _) => ": a tie, so do not trust it",
        (_, Some(true)) => ": narrow, so check it",
        _ => "",
    };
    eprintln!("margin     {:.0} %{doubt}", number(&result["margin"]) * 100.0);
    for chain in result["chains"].as_array().into_iter().flatten() {
        eprintln!("{}", chain_line(screen, chain));
    }
    eprintln!(
        "cost       {} jobs, {} tokens read, {} written, {:.2} s",
        result["jobs"],
        result["prompt_tokens"],
        result["completion_tokens"],
        number(&result["elapsed_ms"]) / 1_000.0
    );
    if let Some(fallback) = result["fallback"].as_str() {
        eprintln!("note       {fallback}");
    }
}

/// The answer that won the vote; where one node was asked there was none to win, and the text is shown as it was written.
fn answer_of<'r>(result: &'r Value, args: &AskArgs) -> &'r str {
    plain(&result[if args.strategy == "direct" { "text" } else { "answer" }])
}

/// Who did what in one chain.
fn chain_line(screen: &Screen, chain: &Value) -> String {
    let steps: Vec<String> = chain["steps"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|step| format!("{} ({} tokens)", screen.name(&step["executor"]), step["tokens"]))
        .collect();
    let planner = match &chain["planner"] {
        Value::Null => String::new(),
        planner => format!("planned by {}, ", screen.name(planner)),
    };
    let end = match chain["answer"].as_str() {
        Some(answer) => format!("answers {} (weight {:.3})", one_line(answer), number(&chain["weight"])),
        None => format!("no answer: {}", chain["error"].as_str().unwrap_or("it is not known why")),
    };
    let number = chain["chain"].as_u64().unwrap_or(0) + 1;
    let done = if steps.is_empty() { String::new() } else { format!("done by {}; ", steps.join(", ")) };
    format!("chain {number}    {planner}{done}{end}")
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;

    #[test]
    fn a_place_counts_from_one() {
        assert_eq!(place(&json!({"chain": 0, "stage": "step", "step": 2})), "chain 1 step 2");
        assert_eq!(place(&json!({"chain": 2, "stage": "plan"})), "chain 3 plan");
        assert_eq!(place(&json!({})), "");
    }

    #[test]
    fn one_nodes_answer_is_shown_as_it_was_written() {
        let result = json!({"answer": "[red, green, blue]", "text": "Red, green, and blue."});
        let asked = |strategy: &str| {
            let args = ["ask", "Colours?", "--strategy", strategy];
            AskArgs::from_arg_matches(&AskArgs::augment_args(clap::Command::new("ask")).get_matches_from(args))
        };
        for (strategy, shown) in [("direct", "Red, green, and blue."), ("chains", "[red, green, blue]")] {
            assert_eq!(asked(strategy).map(|args| answer_of(&result, &args).to_owned()).ok().as_deref(), Some(shown));
        }
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        let text = "ä".repeat(300);
        assert_eq!(one_line(&text).chars().count(), 101);
    }
}
