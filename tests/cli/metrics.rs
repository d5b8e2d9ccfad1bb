//! The admin endpoint of each role, and the dashboards and alerts over its metrics.

mod promql;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use refarch::role::admin::catalogue::{self, Kind, Metric};
use reqwest::{Client, StatusCode, header};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::common::{self, Database, eventually};
use promql::Scrape;

/// Longer than anything here takes on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(2);

/// A metric that an index outside of the database has only.
const OUTSIDE_ONLY: &str = "refarch_lease_remaining_seconds";

/// A role with an admin endpoint.
struct Watched {
    base: String,
    client: Client,
    child: Child,
}

impl Watched {
    fn start(mut command: Command, args: &[&str]) -> Self {
        let address = format!("127.0.0.1:{}", common::free_port());
        command.args(args).args(["--admin", &address]).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        Self { base: format!("http://{address}"), client: Client::new(), child }
    }

    async fn get(&self, path: &str, accept: &str) -> Option<(StatusCode, String, String)> {
        let request = self.client.get(format!("{}{path}", self.base)).header(header::ACCEPT, accept);
        let response = request.send().await.ok()?;
        let status = response.status();
        let kind = response.headers().get(header::CONTENT_TYPE)?.to_str().ok()?.to_owned();
        Some((status, kind, response.text().await.ok()?))
    }

    /// The status of `/readyz`, and the kinds of its reasons.
    async fn ready(&self) -> Option<(StatusCode, Vec<String>)> {
        let (status, _, body) = self.get("/readyz", "*/*").await?;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["ready"], status == StatusCode::OK, "{body}");
        let kinds = body["reasons"].as_array().unwrap().iter();
        Some((status, kinds.map(|reason| reason["kind"].as_str().unwrap().to_owned()).collect()))
    }

    async fn becomes_ready(&self) {
        let mut last = None;
        let ready = tokio::time::timeout(TIMEOUT, async {
            loop {
                last = self.get("/readyz", "*/*").await;
                if last.as_ref().is_some_and(|(status, ..)| *status == StatusCode::OK) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(ready.await.is_ok(), "{} is not ready: {last:?}", self.base);
    }

    async fn page(&self) -> String {
        let (status, _, page) = self.get("/metrics", "text/plain").await.unwrap();
        assert_eq!(status, StatusCode::OK, "{page}");
        page
    }

    async fn scrape(&self) -> Scrape {
        Scrape::read(&self.page().await)
    }
}

/// Values of a metric's samples whose labels contain this text.
fn values(page: &str, metric: &str, labels: &str) -> Vec<f64> {
    let lines = page.lines().filter(|line| line.starts_with(metric) && line.contains(labels));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect()
}

/// A migrated database whose table has these many products.
async fn shop(products: u64) -> Database {
    let database = Database::create().await;
    for args in [&["migrate"][..], &["generate", "--load", "--count", &products.to_string()][..]] {
        let done = database.refarch().args(args).output().await.unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    database
}

/// Names of samples that a metric has.
fn sample_names(metric: &Metric) -> Vec<String> {
    match metric.kind {
        Kind::Histogram => {
            ["_bucket", "_sum", "_count"].iter().map(|end| format!("{}{end}", metric.name)).collect()
        }
        Kind::Counter | Kind::Gauge => vec![metric.name.to_owned()],
    }
}

/// Does a bit of everything with an `up`: work, a search, a row that cannot be read for a while, a round of the proof,
/// and lists for searches.
async fn work(database: &Database, up: &Watched, page: &str) {
    up.becomes_ready().await;
    let client = database.client().await;
    let lists = "INSERT INTO refarch.search_index (target, lists, probes, probes_at_build, rows, build_ms, built_writes, recall, outliers) \
                 SELECT id, 10, 1, 1, 40, 1, 0, 0.99, 1 FROM refarch.target";
    client.batch_execute(lists).await.unwrap();
    let found = up.client.get(format!("{page}/api/v1/search?q=lamp")).send().await.unwrap();
    assert_eq!(found.status(), StatusCode::OK);
    // Without its table the work is held, and says so.
    let rename = "ALTER TABLE public.products_with_increment RENAME TO away; UPDATE public.away SET description = 'a reading lamp' WHERE id = 1";
    client.batch_execute(rename).await.unwrap();
    eventually("the fault to be shown", TIMEOUT, async || {
        let (_, kinds) = up.ready().await.unwrap();
        kinds.contains(&"held".to_owned())
            && values(&up.page().await, "refarch_fault{", "kind=\"held\"").contains(&1.0)
    })
    .await;
    client.batch_execute("ALTER TABLE public.away RENAME TO products_with_increment").await.unwrap();
    up.becomes_ready().await;
}

/// Starts `up`, and waits until its rows are searchable.
async fn start_up(database: &Database) -> (Watched, String) {
    let bind = format!("127.0.0.1:{}", common::free_port());
    let mut command = database.refarch();
    command.envs([("REFARCH_AUDIT_PERIOD_H", "0.001")]);
    let mut up = Watched::start(command, &["up", "--products", "0", "--workers", "1", "--bind", &bind]);
    let mut lines = BufReader::new(up.child.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(TIMEOUT, lines.next_line()).await.unwrap().unwrap();
    assert!(line.is_some_and(|line| line.contains("refarch is up")));
    (up, format!("http://{bind}"))
}

/// The expressions of dashboards and rules, each with its file, and the names that rules record.
fn expressions() -> (Vec<(String, String)>, BTreeSet<String>) {
    let (mut expressions, mut recorded) = (Vec::new(), BTreeSet::new());
    for path in files("grafana", "json") {
        let text = std::fs::read_to_string(&path).unwrap();
        let dashboard: Value = serde_json::from_str(&text).unwrap();
        let before = expressions.len();
        collect(&dashboard, &mut |expression| {
            expressions.push((path.display().to_string(), expression.to_owned()));
        });
        assert!(expressions.len() > before + 10, "{} has few expressions", path.display());
    }
    let rules = config_dir().join("prometheus/refarch.rules.yml");
    for line in std::fs::read_to_string(&rules).unwrap().lines() {
        let line = line.trim().trim_start_matches("- ");
        if let Some(expression) = line.strip_prefix("expr: ") {
            assert!(!expression.starts_with(['|', '>']), "an expression on one line, please: {line}");
            expressions.push((rules.display().to_string(), expression.to_owned()));
        } else if let Some(name) = line.strip_prefix("record: ") {
            recorded.insert(name.to_owned());
        }
    }
    (expressions, recorded)
}

/// Every `expr`, and every `definition` of a variable.
fn collect(value: &Value, found: &mut impl FnMut(&str)) {
    match value {
        Value::Object(keys) => {
            for (key, value) in keys {
                match value {
                    Value::String(text) if key == "expr" || key == "definition" => found(text),
                    value => collect(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

fn config_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config")
}

fn files(dir: &str, end: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(config_dir().join(dir)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == end)).collect();
    files.sort();
    assert!(!files.is_empty(), "no {end} in {dir}");
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboards_and_alerts_name_what_a_scrape_has() {
    let database = shop(40).await;
    let (up, page) = start_up(&database).await;
    work(&database, &up, &page).await;
    let (expressions, recorded) = expressions();
    let mut missing = Vec::new();
    let in_time = tokio::time::timeout(TIMEOUT, async {
        loop {
            // Prometheus asks for OpenMetrics, others do not, and the two write bounds in different ways.
            let open_metrics = up.get("/metrics", "application/openmetrics-text").await.unwrap().2;
            let scrapes = [up.scrape().await, Scrape::read(&open_metrics)];
            let pairs =
                scrapes.iter().flat_map(|scrape| expressions.iter().map(move |named| (scrape, named)));
            missing = pairs
                .flat_map(|(scrape, (file, expression))| {
                    let absent = scrape.missing(expression, &recorded);
                    absent.into_iter().map(move |what| format!("{what} in {file}: {expression}"))
                })
                .collect();
            if missing.is_empty() {
                return scrapes;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    let [scrape, _] = in_time.unwrap_or_else(|_| panic!("not in a scrape:\n{}", missing.join("\n")));
    // A wrong name that is planted into a dashboard is noticed.
    let dashboard = std::fs::read_to_string(config_dir().join("grafana/workers.json")).unwrap();
    let planted = dashboard.replace("refarch_changes_applied_total", "refarch_changes_aplied_total");
    let mut noticed = BTreeSet::new();
    collect(&serde_json::from_str(&planted).unwrap(), &mut |expression| {
        noticed.extend(scrape.missing(expression, &recorded));
    });
    assert_eq!(noticed, ["refarch_changes_aplied_total".to_owned()].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_the_catalogue_is_served_and_series_do_not_grow_with_rows() {
    let database = shop(40).await;
    let (up, page) = start_up(&database).await;
    up.becomes_ready().await;
    println!("series of up at rest: {}", up.scrape().await.series());
    work(&database, &up, &page).await;
    // It blocks on its full pipe, so that it can be asked.
    let generate = Watched::start(common::refarch(), &["generate", "--count", "1000000", "--output", "-"]);
    eventually("generate to answer", TIMEOUT, async || generate.ready().await.is_some()).await;
    let wanted: BTreeSet<String> = catalogue::ALL
        .iter()
        .filter(|metric| metric.name != OUTSIDE_ONLY)
        .flat_map(|m| sample_names(m))
        .collect();
    let mut missing = wanted.clone();
    let generated = generate.scrape().await;
    eventually("every metric", TIMEOUT, async || {
        let scrape = up.scrape().await;
        missing = wanted
            .iter()
            .filter(|name| !scrape.0.contains_key(*name) && !generated.0.contains_key(*name))
            .cloned()
            .collect();
        missing.is_empty()
    })
    .await;
    let scrape = up.scrape().await;
    let unknown: Vec<&String> = scrape.0.keys().filter(|name| !wanted.contains(*name)).collect();
    assert!(unknown.is_empty(), "not in the catalogue: {unknown:?}");
    check_labels(&scrape);

    let before = scrape.all();
    println!("series of up after some work: {}", before.len());
    let client = database.client().await;
    let load = "INSERT INTO products_with_increment (name, description) SELECT 'product ' || n, 'text ' || n FROM generate_series(1, 2000) n; \
                DELETE FROM products_with_increment WHERE id <= 20";
    client.batch_execute(load).await.unwrap();
    eventually("the load to be searchable", TIMEOUT * 2, async || {
        let page = up.page().await;
        values(&page, "refarch_synced", "") == [1.0] && values(&page, "refarch_source_rows{", "") == [2020.0]
    })
    .await;
    let after = up.scrape().await.all();
    println!("series of up after a load of 2,000 rows: {}", after.len());
    let new: Vec<&String> = after.difference(&before).collect();
    // A failure of a kind that was not seen before has a series of its own.
    assert!(new.iter().all(|series| series.starts_with("refarch_retries_total")), "{new:?}");
}

/// Each sample has the labels of its metric in the catalogue.
fn check_labels(scrape: &Scrape) {
    let by_name: BTreeMap<String, &&Metric> = catalogue::ALL
        .iter()
        .flat_map(|metric| sample_names(metric).into_iter().map(move |name| (name, metric)))
        .collect();
    for (name, samples) in &scrape.0 {
        for labels in samples {
            let named: BTreeSet<&str> =
                labels.keys().map(String::as_str).filter(|label| *label != "le").collect();
            assert_eq!(named, by_name[name].labels.iter().copied().collect(), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_serves_its_metrics_health_and_readiness() {
    let database = shop(5).await;
    let bind = format!("127.0.0.1:{}", common::free_port());
    let roles = [
        (
            Watched::start(database.refarch(), &["listen"]),
            "refarch_changes_queued_total",
            "refarch_texts_embedded_total",
        ),
        (
            Watched::start(database.refarch(), &["embed", "--workers", "1"]),
            "refarch_texts_embedded_total",
            "refarch_state_readable",
        ),
        (
            Watched::start(database.refarch(), &["serve", "--bind", &bind]),
            "refarch_state_readable",
            "refarch_changes_queued_total",
        ),
    ];
    for (role, has, lacks) in &roles {
        role.becomes_ready().await;
        let (status, kind, page) = role.get("/metrics", "text/plain;q=0.5,*/*;q=0.1").await.unwrap();
        assert_eq!((status, kind.as_str()), (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8"));
        let scrape = Scrape::read(&page);
        println!("series of {has}: {}", scrape.series());
        assert!(scrape.0.contains_key(*has) && !scrape.0.contains_key(*lacks), "{page}");
        assert!(scrape.0.contains_key("process_cpu_seconds_total"), "{page}");
        let (_, kind, page) =
            role.get("/metrics", "application/openmetrics-text;version=1.0.0,*/*;q=0.1").await.unwrap();
        assert!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "{kind}");
        assert!(page.ends_with("# EOF\n"), "{page}");
        assert_eq!(role.get("/healthz", "*/*").await.unwrap().0, StatusCode::OK);
        assert_eq!(role.get("/else", "*/*").await.unwrap().0, StatusCode::NOT_FOUND);
        // A page of another site whose name leads here.
        let rebound = role.client.get(format!("{}/metrics", role.base)).header(header::HOST, "evil.example");
        assert_eq!(rebound.send().await.unwrap().status(), StatusCode::FORBIDDEN);
    }
    // The admin endpoint is off unless it is asked for, and an address that is taken is an error before any work.
    let taken = roles[0].0.base.trim_start_matches("http://");
    let output = database.refarch().args(["listen", "--admin", taken]).output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(taken) && said.contains("admin.listen"), "{said}");
}

/// Runs promtool, and fails unless it is content. Returns false where there is no promtool.
async fn promtool(args: &[&str], input: Option<&str>) -> bool {
    let mut command = Command::new("promtool");
    command.args(args).current_dir(config_dir().join("prometheus"));
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let Ok(mut child) = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() else {
        common::cannot_run("there is no promtool: install Debian's prometheus, or run scripts/test cli");
        return false;
    };
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes()).await.unwrap();
    }
    let output = child.wait_with_output().await.unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("promtool {}: {said}", args.join(" "));
    assert!(output.status.success(), "promtool {}: {said}", args.join(" "));
    true
}

#[tokio::test]
async fn promtool_is_content_with_rules_and_settings() {
    for args in [
        &["check", "rules", "refarch.rules.yml"][..],
        &["check", "config", "prometheus.yml"],
        &["test", "rules", "refarch.test.yml"],
    ] {
        if !promtool(args, None).await {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_is_content_with_a_scrape() {
    let database = shop(5).await;
    let (up, _) = start_up(&database).await;
    up.becomes_ready().await;
    let page = up.page().await;
    promtool(&["check", "metrics"], Some(&page)).await;
}
