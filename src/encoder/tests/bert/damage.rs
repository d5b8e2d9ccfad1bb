//! Model folders that are damaged or malicious.

use std::path::Path;

use refarch_encoder::{Encoder, Error, KernelKind};
use serde_json::{Value, json};

use crate::reference::Reference;
use crate::{TINY, sequences, slices};

const WEIGHTS: &str = "model.safetensors";

fn load(dir: &Path) -> Result<Encoder, Error> {
    Encoder::load(dir, KernelKind::Portable)
}

fn tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    Reference::write(TINY, 1, dir.path());
    dir
}

fn refused(dir: &Path, what: &str) -> String {
    load(dir).err().unwrap_or_else(|| panic!("{what} was let through")).to_string()
}

#[test]
fn impossible_sizes_are_refused_before_memory_is_allocated() {
    for key in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "vocab_size",
    ] {
        for size in [1 << 20, 1 << 32, 1_u64 << 40, 1 << 62, u64::MAX - 31, u64::MAX] {
            let dir = tiny();
            let file = dir.path().join("config.json");
            let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
            config[key] = json!(size);
            if key == "num_attention_heads" {
                config["hidden_size"] = json!(size);
            }
            std::fs::write(&file, config.to_string()).unwrap();
            let error = refused(dir.path(), &format!("{key} = {size}"));
            let is_told = [key, "hidden_size", WEIGHTS].iter().any(|part| error.contains(part));
            assert!(is_told, "{key} = {size}: {error}");
        }
    }
}

#[test]
fn sizes_that_differ_from_the_weights_are_refused_before_memory_is_allocated() {
    for (key, size) in [
        ("num_hidden_layers", 200),
        ("intermediate_size", 60_000),
        ("max_position_embeddings", 60_000),
        ("vocab_size", 1_000_000),
        ("hidden_size", 8_192),
    ] {
        let dir = tiny();
        let file = dir.path().join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        config[key] = json!(size);
        std::fs::write(&file, config.to_string()).unwrap();
        let error = refused(dir.path(), &format!("{key} = {size}"));
        assert!(error.contains(WEIGHTS), "{key} = {size}: {error}");
    }
}

#[test]
fn unusable_numbers_in_the_configuration_are_refused() {
    for (file, key, value) in [
        ("config.json", "layer_norm_eps", json!(-1.0)),
        ("config.json", "layer_norm_eps", json!(1e300)),
        ("sentence_bert_config.json", "max_seq_length", json!(0)),
        ("sentence_bert_config.json", "max_seq_length", json!(2)),
    ] {
        let dir = tiny();
        let path = dir.path().join(file);
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config[key] = value.clone();
        std::fs::write(&path, config.to_string()).unwrap();
        let error = refused(dir.path(), &format!("{key} = {value}"));
        assert!(error.contains(key) && error.contains(file), "{key} = {value}: {error}");
    }
}

#[test]
fn a_missing_max_seq_length_defaults_to_the_number_of_positions() {
    let dir = tiny();
    std::fs::write(dir.path().join("sentence_bert_config.json"), r#"{"max_seq_length":null}"#).unwrap();
    assert_eq!(load(dir.path()).unwrap().description().max_tokens, TINY.positions);
}

#[test]
fn a_truncated_or_padded_weights_file_is_refused() {
    let dir = tiny();
    let file = dir.path().join(WEIGHTS);
    let whole = std::fs::read(&file).unwrap();
    for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..length]).unwrap();
        let error = refused(dir.path(), &format!("{length} bytes"));
        assert!(error.contains(WEIGHTS), "{length} bytes: {error}");
    }
    std::fs::write(&file, [&whole[..], b"x"].concat()).unwrap();
    refused(dir.path(), "a byte too many");
}

#[test]
fn a_header_that_does_not_match_the_file_is_refused() {
    let dir = tiny();
    let file = dir.path().join(WEIGHTS);
    let whole = std::fs::read(&file).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let header: Value = serde_json::from_slice(&whole[8..8 + length as usize]).unwrap();
    for wrong in [
        0,
        1,
        length - 1,
        length + 1,
        whole.len() as u64 - 8,
        whole.len() as u64,
        1 << 40,
        u64::MAX - 7,
        u64::MAX,
    ] {
        std::fs::write(&file, [&wrong.to_le_bytes(), &whole[8..]].concat()).unwrap();
        let error = refused(dir.path(), &format!("a header of {wrong} bytes"));
        assert!(error.contains(WEIGHTS), "{wrong}: {error}");
    }
    let (first, second) = ("embeddings.LayerNorm.bias", "embeddings.LayerNorm.weight");
    let end = (whole.len() - 8) as u64 - length;
    let offsets = |name: &str| header[name]["data_offsets"].clone();
    for (what, name, key, value) in [
        ("overlapping offsets", first, "data_offsets", offsets(second)),
        ("offsets past the end", first, "data_offsets", json!([end, end + 256])),
        ("offsets past all numbers", first, "data_offsets", json!([0, u64::MAX])),
        ("offsets backwards", first, "data_offsets", json!([256, 0])),
        ("a negative offset", first, "data_offsets", json!([-1, 255])),
        ("a shape beyond its bytes", first, "shape", json!([1_u64 << 40])),
        ("a shape beyond all numbers", first, "shape", json!([u64::MAX, u64::MAX])),
        ("a type of another size", first, "dtype", json!("F64")),
        ("a type that there is not", first, "dtype", json!("F7")),
        ("words of whole numbers", "embeddings.word_embeddings.weight", "dtype", json!("I32")),
    ] {
        let mut changed = header.clone();
        changed[name][key] = value;
        let text = changed.to_string();
        let written =
            [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &whole[8 + length as usize..]].concat();
        std::fs::write(&file, written).unwrap();
        let error = refused(dir.path(), what);
        assert!(error.contains(WEIGHTS), "{what}: {error}");
    }
}

#[test]
fn a_loaded_model_does_not_change_with_its_weights_file() {
    let dir = tiny();
    let encoder = load(dir.path()).unwrap();
    let sequences = sequences(TINY, &[1, 30, 80], 3);
    let mut worker = encoder.execution_context();
    let before = worker.embed(&slices(&sequences));
    let file = dir.path().join(WEIGHTS);
    let length = std::fs::metadata(&file).unwrap().len();
    std::fs::write(&file, vec![7; length as usize]).unwrap();
    assert!(worker.embed(&slices(&sequences)) == before, "written over");
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(0).unwrap();
    assert!(worker.embed(&slices(&sequences)) == before, "cut short");
    assert!(encoder.execution_context().embed(&slices(&sequences)) == before, "by a worker that came later");
}
