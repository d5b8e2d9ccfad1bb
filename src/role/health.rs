//! `refarch health`: asks the process on this machine whether it works. Containers have no other HTTP client.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::cli;
use crate::config::Settings;

/// Most characters of an answer that are shown.
const SHOWN: usize = 500;

/// Asks once. An error means: it does not work.
pub async fn run(args: &cli::Health, settings: &Settings) -> anyhow::Result<()> {
    let address = reachable(args.address.unwrap_or_else(|| configured(settings)));
    let path = if args.ready { "readyz" } else { "healthz" };
    let url = format!("http://{address}/{path}");
    let client = reqwest::Client::builder()
        // The address is this machine's.
        .no_proxy()
        .timeout(Duration::from_secs(args.timeout))
        .build()?;
    let response = client.get(&url).send().await.with_context(|| format!("{url} does not answer"))?;
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    let text: String = text.trim().chars().take(SHOWN).collect();
    if !status.is_success() {
        bail!("{url} answers {status}: {text}");
    }
    super::output::print(format!("{text}\n").as_bytes())
}

/// Where a process with these settings listens.
fn configured(settings: &Settings) -> SocketAddr {
    settings.admin.listen.unwrap_or(settings.serve.bind)
}

/// The address by which this machine reaches a listener. One that listens everywhere listens on loopback too.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
