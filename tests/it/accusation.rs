//! A sampler that lies: it is caught, the whole swarm hears of it, and anybody can fetch what it signed and compute it again.
//!
//! The liar is no process of the product. It is a node like any other up to its engine: it offers itself in the ledger, bids, and takes the
//! trainer's lease. But it makes up every reward.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chorus_core::{Command, Effect, Input, NetInput, NodeConfig, StoreInput, Topic};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_net::{BulkConfig, BulkEvent, BulkPlane, GossipToken, Net, NetConfig, NetEvent, NetHandle, Ticket, Verdict};
use chorus_protocol::capability::{Capability, SamplingOffer};
use chorus_protocol::job::Finish;
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Assignment, Bulk, Hello, Rollout, RolloutFrame, Segment};
use chorus_protocol::{NodeId, SecretKey, Text, Verified, WallTime};
use chorus_tests::{Node, NodeOptions, Swarm, wait_for};
use chorus_trainer::env::{by_name, training_task_of};
use chorus_trainer::policy::Tokenizer;
use serde_json::Value;

use crate::training::{sampler, trainer};

const NETWORK: &str = "it-accusation";

/// Right answers to what is assigned, each with a reward that nobody gives.
fn lies(work: &Assignment, version: Version) -> Vec<Rollout> {
    let environment = by_name(work.environment.as_str()).unwrap();
    let task = training_task_of(&*environment, work.seed);
    let completion = Tokenizer.encode(&task.solution);
    let one = |member| Rollout {
        group: work.group,
        member,
        environment: work.environment.clone(),
        seed: work.seed,
        prompt: Arc::from(Tokenizer.encode(&task.prompt)),
        log_probs: vec![-0.5; completion.len()],
        completion: completion.clone(),
        reward: 0.25,
        finish: Finish::Stop,
        segments: vec![Segment { version, from: 0 }],
    };
    (work.first..work.first + work.members).map(one).collect()
}

fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    WallTime::from_millis(u64::try_from(since.as_millis()).unwrap())
}

/// The liar up to its engine: a node whose disk takes everything and whose runs run for ever.
struct Facade {
    node: chorus_core::Node,
    rng: Rng,
    epoch: Instant,
    net: NetHandle,
    tokens: BTreeMap<u64, GossipToken>,
}

impl Facade {
    fn new(key: SecretKey, net: NetHandle) -> Self {
        let node = chorus_core::Node::new(NodeConfig::new(NETWORK.parse().unwrap()), key);
        let mut facade = Self { node, rng: Rng::from_u64(7), epoch: Instant::now(), net, tokens: BTreeMap::new() };
        let capability = Capability {
            name: Text::truncated("liar"),
            software: Text::default(),
            models: Default::default(),
            devices: Default::default(),
            slots: 0,
            skills: Default::default(),
            tools: Default::default(),
            sampling: Some(SamplingOffer { slots: 16, price_milli: 0, policy: None }),
        };
        facade.handle(Some(Input::Command(Command::Offer(Box::new(capability)))));
        facade
    }

    fn now(&self) -> Time {
        Time::from_nanos(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap())
    }

    fn sleep(&self) -> Duration {
        self.node.deadline().map_or(Duration::from_secs(1), |at| at.since(self.now()).min(Duration::from_secs(1)))
    }

    /// Tells the node something, or that time has passed.
    fn handle(&mut self, input: Option<Input>) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let (mut out, now) = (Outbox::new(), self.now());
            let mut cx = Ctx { now, wall: wall(), rng: &mut self.rng };
            match input {
                Some(input) => self.node.handle(&mut cx, input, &mut out),
                None => self.node.expire(&mut cx, &mut out),
            }
            for effect in out.drain() {
                match effect {
                    Effect::Publish { topic: Topic::Ledger, bytes } => {
                        let _ = self.net.publish(chorus_net::Topic::Ledger, bytes);
                    }
                    Effect::Send { to, bytes } => {
                        let _ = self.net.send(to, 0, bytes);
                    }
                    Effect::Validate { token, .. } => {
                        let token = self.tokens.remove(&token).unwrap();
                        let _ = self.net.validated(token, Verdict::Ignore);
                    }
                    Effect::Persist(batch) => {
                        inputs.push_back(Some(Input::Store(StoreInput::Persisted { batch: batch.batch })));
                    }
                    _ => {}
                }
            }
        }
    }

    fn heard(&mut self, event: NetEvent) {
        let input = match event {
            NetEvent::PeerUp { node, .. } => NetInput::PeerUp(node),
            NetEvent::PeerDown { node, .. } => NetInput::PeerDown(node),
            NetEvent::Message { from, bytes } => NetInput::Direct { from, bytes },
            NetEvent::Gossip { topic, from, token, bytes } => {
                let number = self.tokens.len() as u64;
                self.tokens.insert(number, token);
                let topic = match topic {
                    chorus_net::Topic::Ledger => Topic::Ledger,
                    chorus_net::Topic::Beacon => Topic::Beacon,
                };
                NetInput::Gossip { token: number, from, topic, bytes }
            }
            _ => return,
        };
        self.handle(Some(Input::Net(input)));
    }
}

/// Samples for a policy until it is shown the door.
async fn lie(key: SecretKey, ticket: Ticket, policy: PolicyId) {
    let mut net = NetConfig::new(NETWORK.parse().unwrap());
    net.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    (net.mdns, net.bootstrap) = (false, ticket.bootstrap());
    let (net, mut heard) = Net::start(net, &key).await.unwrap();
    let bulk = BulkConfig { listen: vec!["127.0.0.1:0".parse().unwrap()], ..BulkConfig::default() };
    let (bulk, mut events) = BulkPlane::start(bulk, &key, &net).await.unwrap();
    let mut facade = Facade::new(key.clone(), net);
    let (mut sequence, mut opening) = (0, None);
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until {
        tokio::select! {
            Some(event) = heard.recv() => {
                if matches!(&event, NetEvent::PeerUp { node, .. } if *node == policy.owner) {
                    opening = bulk.open(policy.owner).ok();
                }
                facade.heard(event);
            }
            Some(event) = events.recv() => match event {
                BulkEvent::Opened { session, .. } => {
                    let policy = policy.clone();
                    let hello = Hello { policy, serving: None, slots: 16, first_unacknowledged: sequence + 1, boot: 1 };
                    bulk.send(session, &Bulk::Hello(hello), None).unwrap();
                }
                BulkEvent::Message { session, message: Bulk::Assign { credit, work }, .. } if !work.is_empty() => {
                    let rollouts: Vec<Rollout> = work.iter().flat_map(|work| lies(work, credit.version)).collect();
                    sequence += 1;
                    let frame = RolloutFrame::new(policy.clone(), sequence, wall(), &rollouts).unwrap();
                    let frame = Verified::sign(&key, &NETWORK.parse().unwrap(), frame).unwrap();
                    bulk.send(session, &Bulk::Frame(frame.to_wire()), None).unwrap();
                }
                BulkEvent::Closed { session, .. } if opening == Some(session) && sequence > 0 => return,
                BulkEvent::Closed { .. } => opening = bulk.open(policy.owner).ok(),
                _ => {}
            },
            () = tokio::time::sleep(facade.sleep()) => facade.handle(None),
        }
    }
    panic!("nobody shows the liar the door");
}

fn accusations(node: &Node) -> Vec<Value> {
    let (_, page) = node.get("/v1/ledger?kind=misbehaviour");
    page["entries"].as_array().cloned().unwrap_or_default()
}

fn check(node: &Node, evidence: &str) -> (bool, String) {
    let out = node.command(&["trainer", "evidence", evidence]).output().unwrap();
    (out.status.success(), format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)))
}

#[test]
fn a_liar_is_accused_before_the_swarm_and_anybody_can_check_what_it_signed() {
    let mut swarm = Swarm::new(NETWORK);
    let teacher = swarm.start(&trainer("staleness = 2"));
    let keeper = NodeOptions { config: "[sampler]\nslots = 0\n".into(), ..sampler(&swarm.nodes[teacher]) };
    let first = swarm.start(&keeper);
    let (key, status) = (SecretKey::from_bytes(&[77; 32]), swarm.nodes[teacher].status());
    let liar = key.node_id().to_string();
    let owner: NodeId = status["node"].as_str().unwrap().parse().unwrap();
    let policy = PolicyId { owner, name: Text::new("lesson").unwrap() };
    let ticket: Ticket = status["ticket"].as_str().unwrap().parse().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(lie(key, ticket, policy));

    let told = wait_for("an accusation in the ledger of another node", || accusations(&swarm.nodes[first]).pop());
    let accusation = &told["body"]["misbehaviour"];
    assert_eq!((told["author"].as_str(), accusation["accused"].as_str()), (status["node"].as_str(), Some(&*liar)));
    assert_eq!((&accusation["charge"], &accusation["policy"]["name"]), (&"wrong_reward".into(), &"lesson".into()));
    let evidence = accusation["evidence"].as_str().unwrap();
    let listed = swarm.nodes[first].command(&["trainer", "evidence"]).output().unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).contains(evidence), "{listed:?}");
    let (convicts, said) = check(&swarm.nodes[first], &evidence[..12]);
    assert!(convicts && said.contains("WrongReward") && said.contains(&liar), "{said}");
    let metrics = swarm.nodes[first].get_text("/metrics");
    assert!(
        metrics.contains("chorus_ledger_accusations 1") && metrics.contains("chorus_ledger_policies 1"),
        "{metrics}"
    );
    // Whoever fetched it holds it too: nobody needs the accuser any more.
    swarm.nodes[teacher].kill();
    let second = swarm.start(&keeper);
    wait_for("the accusation on a node that came later", || accusations(&swarm.nodes[second]).pop());
    wait_for("the evidence from who fetched it first", || check(&swarm.nodes[second], evidence).0.then_some(()));
    let (convicts, said) = check(&swarm.nodes[second], &"0".repeat(64));
    assert!(!convicts && said.contains("nobody has it"), "{said}");
}
