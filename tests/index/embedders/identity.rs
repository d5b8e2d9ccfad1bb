//! A model's name covers everything that determines its vectors.

use std::fs;
use std::path::Path;

use refarch::backend::minilm::Description;
use refarch::encoder::Precision;

use crate::common;

const CONFIG: &str = "config.json";
const POOLING: &str = "1_Pooling/config.json";
const SENTENCE: &str = "sentence_bert_config.json";

/// A copy of the model; the weights are linked to until a test writes others.
fn copy(to: &Path) {
    let from = common::runtime_dir().join("runtime/model").canonicalize().unwrap();
    fs::create_dir_all(to.join("1_Pooling")).unwrap();
    for file in [CONFIG, POOLING, SENTENCE, "tokenizer.json"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    std::os::unix::fs::symlink(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
}

fn name(dir: &Path) -> String {
    Description::read(dir, Precision::F32).unwrap().model
}

fn replace(dir: &Path, file: &str, from: &str, to: &str) {
    let text = fs::read_to_string(dir.join(file)).unwrap();
    assert!(text.contains(from), "{file} has no {from}");
    fs::write(dir.join(file), text.replacen(from, to, 1)).unwrap();
}

#[test]
fn a_different_model_has_a_different_name() {
    let root = tempfile::tempdir().unwrap();
    let mut names = vec!["all-MiniLM-L6-v2/f32".to_owned()];
    let stock = root.path().join("stock");
    copy(&stock);
    assert_eq!(name(&stock), names[0], "the stock model keeps its name, wherever it lies");
    for (number, (file, from, to)) in [
        ("tokenizer.json", "\"lowercase\":true", "\"lowercase\":false"),
        ("tokenizer.json", "\"juniper\"", "\"junipes\""),
        (
            POOLING,
            "\"pooling_mode_cls_token\": false,\n  \"pooling_mode_mean_tokens\": true",
            "\"pooling_mode_cls_token\": true,\n  \"pooling_mode_mean_tokens\": false",
        ),
        (SENTENCE, "256", "128"),
        (CONFIG, "\"num_hidden_layers\": 6", "\"num_hidden_layers\": 5"),
        (CONFIG, "\"num_attention_heads\": 12", "\"num_attention_heads\": 6"),
        (CONFIG, "1e-12", "1e-5"),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = root.path().join(format!("changed-{number}"));
        copy(&dir);
        replace(&dir, file, from, to);
        let changed = name(&dir);
        assert!(!names.contains(&changed), "{file} with {to} passes for another: {changed}");
        names.push(changed);
    }
    let dir = root.path().join("weights");
    copy(&dir);
    let mut weights = fs::read(dir.join("model.safetensors")).unwrap();
    // Between the places that a sample would look at.
    let at = weights.len() / 64 * 3 + 700_000;
    weights[at] ^= 1;
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("model.safetensors"), &weights).unwrap();
    let changed = name(&dir);
    assert!(!names.contains(&changed), "weights that differ in a bit pass for the others: {changed}");
    // The same model elsewhere is the same model.
    let moved = root.path().join("moved");
    fs::rename(&dir, &moved).unwrap();
    assert_eq!(name(&moved), changed);
    // In place, under a process that has looked at it before.
    weights[at] ^= 3;
    fs::write(moved.join("model.safetensors"), &weights).unwrap();
    assert_ne!(name(&moved), changed);
}

#[test]
fn files_that_do_not_affect_vectors_do_not_change_the_name() {
    let root = tempfile::tempdir().unwrap();
    copy(root.path());
    fs::write(root.path().join("README.md"), "nothing").unwrap();
    replace(root.path(), CONFIG, "\"hidden_dropout_prob\": 0.1", "\"hidden_dropout_prob\": 0.2");
    assert_eq!(name(root.path()), "all-MiniLM-L6-v2/f32");
}
