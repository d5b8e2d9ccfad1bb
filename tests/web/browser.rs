//! The page in a real Chromium, driven over its `DevTools` protocol: typing, editing, reading.

use std::process::Stdio;
use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::common::{self, Database};

/// A time limit that no step here reaches, even on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Flags that keep Chromium from sending requests to other hosts.
const FLAGS: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,900",
    "about:blank",
];

/// A page, in a browser that only this test uses.
struct Page {
    _browser: Child,
    _profile: tempfile::TempDir,
    socket: WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>,
    calls: u64,
    problems: Vec<String>,
}

impl Page {
    async fn open(url: &str) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let browser = Command::new(common::browser())
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let port_file = profile.path().join("DevToolsActivePort");
        let mut port = String::new();
        common::eventually("Chromium to start", TIMEOUT, async || {
            port = std::fs::read_to_string(&port_file).unwrap_or_default();
            port.lines().count() == 2
        })
        .await;
        let list = format!("http://127.0.0.1:{}/json/list", port.lines().next().unwrap());
        let targets: Value = reqwest::get(list).await.unwrap().json().await.unwrap();
        let target = targets.as_array().unwrap().iter().find(|target| target["type"] == "page").unwrap();
        let (socket, _) = connect_async(target["webSocketDebuggerUrl"].as_str().unwrap()).await.unwrap();
        let mut page = Self { _browser: browser, _profile: profile, socket, calls: 0, problems: Vec::new() };
        page.call("Runtime.enable", json!({})).await;
        page.call("Log.enable", json!({})).await;
        page.call("Page.navigate", json!({ "url": url })).await;
        page
    }

    async fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.calls += 1;
        let id = self.calls;
        let call = json!({ "id": id, "method": method, "params": parameters }).to_string();
        self.socket.send(Message::text(call)).await.unwrap();
        loop {
            let message = tokio::time::timeout(TIMEOUT, self.socket.next()).await.unwrap().unwrap().unwrap();
            let Ok(text) = message.into_text() else { continue };
            let Ok(answer) = serde_json::from_str::<Value>(&text) else { continue };
            let event = answer["method"].as_str().unwrap_or_default();
            if event == "Runtime.exceptionThrown"
                || (event == "Log.entryAdded" && answer["params"]["entry"]["level"] == "error")
            {
                self.problems.push(answer["params"].to_string());
            }
            if answer["id"] == id {
                return answer["result"].clone();
            }
        }
    }

    /// The value of a JavaScript expression.
    async fn eval(&mut self, expression: &str) -> Value {
        let parameters = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call("Runtime.evaluate", parameters).await;
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    async fn until(&mut self, expression: &str) {
        let start = std::time::Instant::now();
        while self.eval(expression).await != true {
            if start.elapsed() > TIMEOUT {
                let page = self.eval("document.body.innerText").await;
                panic!("not within {TIMEOUT:?}: {expression}\n{page}\n{:#?}", self.problems);
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Types a text into the element that has the focus.
    async fn type_text(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text })).await;
    }

    async fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key, "code": key })).await;
        }
    }
}

const FIRST: &str = "document.querySelector('#rows tr')";

/// Starts every role on a database. Returns the process and the page's address once the page can be opened.
async fn up(database: &Database, env: &[(&str, &str)]) -> (Child, String) {
    let address = format!("127.0.0.1:{}", common::free_port());
    let mut command = database.refarch();
    command.args(["up", "--products", "0", "--workers", "1", "--bind", &address]).envs(env.iter().copied());
    let roles = command.stdout(Stdio::null()).spawn().unwrap();
    let ready = format!("http://{address}/readyz");
    common::eventually("the server to be ready", TIMEOUT, async || {
        reqwest::get(&ready).await.is_ok_and(|r| r.status().is_success())
    })
    .await;
    (roles, format!("http://{address}/"))
}

#[tokio::test]
async fn a_user_searches_edits_and_sees_the_edit_become_searchable() {
    let database = Database::create().await;
    assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
    let client = database.client().await;
    client
        .batch_execute(
            "INSERT INTO products_with_increment (id, name, sku, description, price) VALUES \
             (1, 'Kettle', 'K-1', 'An electric kettle for boiling water', '$20'), \
             (2, 'Tent', 'T-1', 'A tent for two <b>hikers</b>', '$120'), \
             (3, NULL, NULL, repeat('An office chair for bad backs. ', 40000), NULL)",
        )
        .await
        .unwrap();
    let (mut roles, url) = up(&database, &[]).await;

    let mut page = Page::open(&url).await;
    page.until("document.querySelectorAll('#rows tr').length === 3").await;
    page.until("document.querySelector('#s-sync').textContent === 'all'").await;
    assert_eq!(page.eval("document.querySelector('#rows b')").await, Value::Null, "markup in a row is text");
    assert_eq!(
        page.eval("document.querySelectorAll('#rows tr')[2].textContent.length < 2000").await,
        true,
        "long texts are cut"
    );

    page.press("/").await;
    page.type_text("something to make tea").await;
    page.until(&format!("document.title.startsWith('something to make tea') && {FIRST}.row.id === 1")).await;
    assert_eq!(page.eval("document.activeElement.id").await, "q");

    page.eval(&format!("{FIRST}.querySelector('.c-description .cell').click()")).await;
    page.eval("document.activeElement.select()").await;
    page.type_text("A stove that burns wood in the garden").await;
    page.press("Escape").await;
    assert_eq!(
        page.eval(&format!("{FIRST}.querySelector('.c-description .cell').textContent")).await,
        "An electric kettle for boiling water"
    );
    page.eval(&format!("{FIRST}.querySelector('.c-description .cell').click()")).await;
    page.eval("document.activeElement.select()").await;
    page.type_text("A stove that burns wood in the garden").await;
    page.press("Enter").await;
    page.until(&format!("/^searchable after \\d+ ms$/.test({FIRST}.status.textContent)")).await;
    let row =
        client.query_one("SELECT description FROM products_with_increment WHERE id = 1", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "A stove that burns wood in the garden");

    page.press("/").await;
    page.type_text("fireplace").await;
    page.until(&format!("document.title.startsWith('fireplace') && {FIRST}?.row.id === 1")).await;

    // Another client edits the row after the page read it and before the page writes it.
    client.batch_execute("UPDATE products_with_increment SET name = 'Theirs' WHERE id = 1").await.unwrap();
    page.eval(&format!("{FIRST}.querySelector('.c-name .cell').click()")).await;
    page.eval("document.activeElement.select()").await;
    page.type_text("Mine").await;
    page.press("Enter").await;
    page.until("document.querySelector('#conflict').open && document.querySelector('#theirs').textContent === 'Theirs'").await;
    page.eval("document.querySelector('#conflict [value=mine]').click()").await;
    page.until(&format!("{FIRST}.status.textContent.startsWith('searchable')")).await;
    let row = client.query_one("SELECT name FROM products_with_increment WHERE id = 1", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "Mine");

    page.eval(&format!("{FIRST}.querySelector('.remove').click(); {FIRST}.querySelector('.remove').click()"))
        .await;
    page.until(&format!("{FIRST}?.row.id !== 1")).await;
    assert!(
        client.query_opt("SELECT FROM products_with_increment WHERE id = 1", &[]).await.unwrap().is_none()
    );

    page.eval("history.back()").await;
    page.until("document.querySelector('#q').value === '' && document.title === 'refarch: products'").await;
    // The conflict must answer 412. No other request may fail.
    let problems: Vec<&String> = page.problems.iter().filter(|problem| !problem.contains("412")).collect();
    assert!(problems.is_empty(), "{problems:#?}");

    let pid = nix::unistd::Pid::from_raw(roles.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(roles.wait().await.unwrap().success());
    page.until("!document.querySelector('#banner').hidden").await;
}

#[tokio::test]
async fn an_edit_asks_for_the_token_once_and_keeps_it_for_the_session() {
    let database = Database::create().await;
    assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
    let client = database.client().await;
    client
        .batch_execute("INSERT INTO products_with_increment (id, name, description) VALUES (1, 'Kettle', 'An electric kettle')")
        .await
        .unwrap();
    let (mut roles, url) = up(&database, &[("REFARCH_SERVE_EDIT_TOKEN", "hush")]).await;
    let mut page = Page::open(&url).await;
    page.until("document.querySelectorAll('#rows tr').length === 1").await;
    let edit = async |page: &mut Page, text: &str| {
        page.eval(&format!("{FIRST}.querySelector('.c-name .cell').click()")).await;
        page.eval("document.activeElement.select()").await;
        page.type_text(text).await;
        page.press("Enter").await;
    };
    edit(&mut page, "Samovar").await;
    for token in ["guess", "hush"] {
        page.until(
            "document.querySelector('#token').open && document.querySelector('#token input').value === ''",
        )
        .await;
        page.eval("document.querySelector('#token input').focus()").await;
        page.type_text(token).await;
        page.eval("document.querySelector('#token [value=use]').click()").await;
    }
    page.until(&format!("{FIRST}.status.textContent.startsWith('searchable')")).await;
    edit(&mut page, "Teapot").await;
    page.until(&format!(
        "{FIRST}.status.textContent.startsWith('searchable') && {FIRST}.row.name === 'Teapot'"
    ))
    .await;
    assert_eq!(page.eval("document.querySelector('#token').open").await, false, "it is asked for once");
    let row = client.query_one("SELECT name FROM products_with_increment WHERE id = 1", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "Teapot");
    assert_eq!(page.eval("sessionStorage.getItem('token')").await, "hush");
    assert_eq!(page.eval("localStorage.length").await, 0);
    assert_eq!(page.eval("location.href.includes('hush')").await, false);

    let pid = nix::unistd::Pid::from_raw(roles.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(roles.wait().await.unwrap().success());
}

#[tokio::test]
async fn next_and_previous_go_by_the_rows_that_are_shown() {
    let database = Database::create().await;
    assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
    let client = database.client().await;
    client
        .batch_execute("INSERT INTO products_with_increment (id, name) SELECT i, 'Row ' || i FROM generate_series(1, 7) i")
        .await
        .unwrap();
    let (mut roles, url) = up(&database, &[("REFARCH_SERVE_PAGE_SIZE", "2")]).await;
    let mut page = Page::open(&url).await;
    let shows = async |page: &mut Page, ids: &str, is_first: bool, is_last: bool| {
        page.until(&format!(
            "[...document.querySelectorAll('#rows tr')].map((line) => line.row?.id).join() === '{ids}' \
             && document.querySelector('#previous').disabled === {is_first} \
             && document.querySelector('#next').disabled === {is_last}"
        ))
        .await;
    };
    let turn = async |page: &mut Page, button: &str| {
        page.eval(&format!("document.querySelector('#{button}').click()")).await;
    };
    shows(&mut page, "1,2", true, false).await;
    turn(&mut page, "next").await;
    shows(&mut page, "3,4", false, false).await;
    assert_eq!(page.eval("document.querySelector('#page').textContent").await, "Page 2 of 4");
    // The address names the row, and so it shows the same page to whoever opens it.
    assert_eq!(page.eval("new URLSearchParams(location.search).get('after')").await, "2");
    page.call("Page.reload", json!({})).await;
    page.until("document.readyState === 'complete'").await;
    shows(&mut page, "3,4", false, false).await;

    // A page counted from the beginning would leave row 5 out.
    client.batch_execute("DELETE FROM products_with_increment WHERE id = 1").await.unwrap();
    turn(&mut page, "next").await;
    shows(&mut page, "5,6", false, false).await;
    turn(&mut page, "next").await;
    shows(&mut page, "7", false, true).await;
    turn(&mut page, "previous").await;
    shows(&mut page, "5,6", false, false).await;
    turn(&mut page, "previous").await;
    shows(&mut page, "3,4", false, false).await;
    // The first page begins with the first row.
    turn(&mut page, "previous").await;
    shows(&mut page, "2,3", true, false).await;
    page.eval("history.back()").await;
    shows(&mut page, "3,4", false, false).await;
    assert!(page.problems.is_empty(), "{:#?}", page.problems);

    let pid = nix::unistd::Pid::from_raw(roles.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(roles.wait().await.unwrap().success());
}
