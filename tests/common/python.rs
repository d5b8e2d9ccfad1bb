//! The Python environment that `scripts/test` makes: vendors' clients, and moto's server.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Mutex;

/// The interpreter that has `tests/python/requirements.txt`. A missing one fails the test: what did not
/// run has shown nothing.
pub fn python() -> PathBuf {
    let python = super::runtime_dir().join("runtime/python/bin/python");
    assert!(python.is_file(), "{} is missing: run scripts/test, which makes it", python.display());
    python
}

/// moto's server, which the tests of one process share; it ends with the last that uses it.
pub struct Moto {
    child: Child,
    url: String,
}

static MOTO: Mutex<Weak<Moto>> = Mutex::const_new(Weak::new());

impl Moto {
    /// The server, started if it does not run.
    pub async fn shared() -> Arc<Self> {
        let mut shared = MOTO.lock().await;
        if let Some(moto) = shared.upgrade() {
            return moto;
        }
        let port = super::free_port();
        let child = Command::new(python().with_file_name("moto_server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moto = Arc::new(Self { child, url: format!("http://127.0.0.1:{port}") });
        super::eventually("moto to answer", Duration::from_mins(2), async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        *shared = Arc::downgrade(&moto);
        moto
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
