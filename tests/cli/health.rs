//! `refarch health`, as a container's health check uses it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};

use crate::common::{free_port, refarch};

/// Answers one request with this status, and returns its first line.
fn answering(status: &'static str) -> (SocketAddr, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 4096];
        let length = stream.read(&mut head).unwrap();
        let body = "not ready: database";
        let answer =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8_lossy(&head[..length]).lines().next().unwrap_or_default().to_owned()
    });
    (address, served)
}

#[tokio::test]
async fn health_asks_the_process_and_exits_with_its_answer() {
    for (args, path, status, code) in [
        (&["health"][..], "/healthz", "200 OK", 0),
        (&["health", "--ready"], "/readyz", "200 OK", 0),
        (&["health", "--ready"], "/readyz", "503 Service Unavailable", 1),
    ] {
        let (address, served) = answering(status);
        // As in an image: the address is where the process listens, and not where it can be reached.
        let listens = format!("0.0.0.0:{}", address.port());
        let output = refarch().args(args).env("REFARCH_ADMIN_LISTEN", &listens).output().await.unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert_eq!(served.join().unwrap(), format!("GET {path} HTTP/1.1"));
        let error = String::from_utf8_lossy(&output.stderr);
        let told = error.contains(&format!(
            "http://{address}/readyz answers 503 Service Unavailable: not ready: database"
        ));
        assert_eq!(told, code == 1, "{error}");
    }
}

#[tokio::test]
async fn health_of_a_process_that_is_not_there_fails() {
    let address = format!("127.0.0.1:{}", free_port());
    let output = refarch().args(["health", "--address", &address]).output().await.unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains(&format!("http://{address}/healthz does not answer")), "{error}");
}

#[tokio::test]
async fn without_an_admin_endpoint_the_page_is_asked() {
    let (address, served) = answering("200 OK");
    let output =
        refarch().arg("health").env("REFARCH_SERVE_BIND", address.to_string()).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(served.join().unwrap(), "GET /healthz HTTP/1.1");
}

#[tokio::test]
async fn every_command_has_a_manual_page() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man");
    let output = refarch().args(["man", "--dir"]).arg(&pages).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    for name in ["refarch.1", "refarch-up.1", "refarch-setup.1", "refarch-health.1", "refarch-verify.1"] {
        let page = std::fs::read_to_string(pages.join(name)).unwrap_or_default();
        assert!(page.contains(".TH"), "{name}: {page}");
    }
    let output = refarch().arg("man").output().await.unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains(".TH refarch 1"), "{output:?}");
}
