//! A network node by hand, for looking at two machines: `net_node SEED [--mdns] [--relay] [--listen ADDR]… [TICKET]`. It prints what
//! happens, and its ticket.

#![allow(clippy::print_stdout)]

use chorus_net::{Net, NetConfig, Ticket};
use chorus_protocol::SecretKey;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let mut args = std::env::args().skip(1);
    let seed: u8 = args.next().ok_or("the first argument is a number that stands for the key")?.parse()?;
    let mut cfg = NetConfig { mdns: false, ..NetConfig::new("by-hand".parse()?) };
    let mut listen = Vec::new();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--mdns" => cfg.mdns = true,
            "--relay" => cfg.relay_server = true,
            "--listen" => listen.push(args.next().ok_or("an address must follow --listen")?.parse()?),
            ticket => cfg.bootstrap = ticket.parse::<Ticket>()?.bootstrap(),
        }
    }
    if !listen.is_empty() {
        cfg.listen = listen;
    }
    let (handle, mut events) = Net::start(cfg, &SecretKey::from_bytes(&[seed; 32])).await?;
    println!("{}\n{}", handle.node(), handle.ticket());
    while let Some(event) = events.recv().await {
        println!("{event:?}");
    }
    Ok(())
}
