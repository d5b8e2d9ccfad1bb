//! The flags of the admin endpoint.

use std::net::SocketAddr;

use clap::Args;

/// The admin endpoint of a role that runs for long.
#[derive(Debug, Args)]
pub struct Admin {
    /// Serve /metrics, /healthz and /readyz at this address, such as 127.0.0.1:9464 [default: off]
    #[arg(long = "admin", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
}
