//! The image, the fleet for compose, the manifests for Kubernetes and the workflows. The rules are in Python, where YAML
//! and the linters are at home.

use std::path::Path;
use std::process::Command;

use crate::common;

/// Runs one of the Python files here. Its output has the numbers of assertions and of planted mistakes.
fn passes(file: &str) {
    let python = common::runtime_dir().join("runtime/containers/bin/python");
    assert!(python.is_file(), "{} is missing: run scripts/test deploy, which makes it", python.display());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/deploy/containers");
    let output = Command::new(python)
        .arg(file)
        .current_dir(folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("REFARCH", env!("CARGO_BIN_EXE_refarch"))
        .output()
        .unwrap();
    let (text, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{told}");
    print!("{text}");
}

#[test]
fn the_compose_file_keeps_its_rules() {
    passes("compose.py");
}

#[test]
fn the_manifests_keep_their_rules() {
    if Command::new("kubectl").args(["version", "--client"]).output().is_err() {
        return common::cannot_run("there is no kubectl, which builds the overlays (1.21 or later)");
    }
    passes("kubernetes.py");
}

#[test]
fn refarch_takes_every_command_line_that_is_shipped() {
    passes("commands.py");
}

#[test]
fn linters_are_content_with_images_scripts_and_workflows() {
    passes("lint.py");
}
