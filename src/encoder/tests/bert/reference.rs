//! A simple BERT, as in the paper, in `f64`, one number after the other; and random models for tests.

use std::collections::BTreeMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

/// The shape of a random model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub inner: usize,
    pub positions: usize,
    pub vocabulary: usize,
    pub is_cls: bool,
    /// Type of the numbers in the file.
    pub dtype: Dtype,
    /// Prefix of the tensors' names in the file.
    pub prefix: &'static str,
}

/// The weights of a random model, by their names without prefix.
pub struct Reference {
    shape: Shape,
    tensors: BTreeMap<String, Vec<f64>>,
}

const EPSILON: f64 = 1e-12;

impl Reference {
    /// Generates random weights, and writes a model folder in the Hugging Face layout.
    pub fn write(shape: Shape, seed: u64, dir: &Path) -> Self {
        let Shape { hidden, inner, positions, vocabulary, .. } = shape;
        let mut sizes = vec![
            ("embeddings.word_embeddings.weight".to_owned(), vec![vocabulary, hidden]),
            ("embeddings.position_embeddings.weight".into(), vec![positions, hidden]),
            ("embeddings.token_type_embeddings.weight".into(), vec![2, hidden]),
        ];
        let mut norms = vec!["embeddings.LayerNorm".to_owned()];
        for layer in 0..shape.layers {
            let layer = format!("encoder.layer.{layer}");
            for (name, rows, columns) in [
                ("attention.self.query", hidden, hidden),
                ("attention.self.key", hidden, hidden),
                ("attention.self.value", hidden, hidden),
                ("attention.output.dense", hidden, hidden),
                ("intermediate.dense", inner, hidden),
                ("output.dense", hidden, inner),
            ] {
                sizes.push((format!("{layer}.{name}.weight"), vec![rows, columns]));
                sizes.push((format!("{layer}.{name}.bias"), vec![rows]));
            }
            norms.push(format!("{layer}.attention.output.LayerNorm"));
            norms.push(format!("{layer}.output.LayerNorm"));
        }
        for norm in norms {
            sizes.push((format!("{norm}.weight"), vec![hidden]));
            sizes.push((format!("{norm}.bias"), vec![hidden]));
        }
        let mut random = StdRng::seed_from_u64(seed);
        let mut tensors = BTreeMap::new();
        let mut files = Vec::new();
        for (name, size) in sizes {
            let spread = match size.as_slice() {
                // With this spread, scores differ, and sums are of the same size as the numbers they are
                // added to.
                [_, columns] if !name.starts_with("embeddings") => 2.0 / (*columns as f32).sqrt(),
                _ => 0.5,
            };
            let offset = if name.ends_with("LayerNorm.weight") { 1.0 } else { 0.0 };
            let count = size.iter().product::<usize>();
            let mut bytes = Vec::new();
            let numbers: Vec<f64> = (0..count)
                .map(|_| put(offset + random.random_range(-spread..spread), shape.dtype, &mut bytes))
                .collect();
            files.push((format!("{}{name}", shape.prefix), size, bytes));
            tensors.insert(name, numbers);
        }
        let views = files
            .iter()
            .map(|(name, size, bytes)| (name, TensorView::new(shape.dtype, size.clone(), bytes).unwrap()));
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let config = json!({
            "model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
            "hidden_size": hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "intermediate_size": inner, "max_position_embeddings": positions, "vocab_size": vocabulary,
            "type_vocab_size": 2, "layer_norm_eps": EPSILON,
        });
        let pooling =
            json!({ "pooling_mode_cls_token": shape.is_cls, "pooling_mode_mean_tokens": !shape.is_cls });
        let sentence = json!({ "max_seq_length": positions, "do_lower_case": false });
        std::fs::create_dir(dir.join("1_Pooling")).unwrap();
        for (name, value) in [
            ("config.json", config),
            ("1_Pooling/config.json", pooling),
            ("sentence_bert_config.json", sentence),
        ] {
            std::fs::write(dir.join(name), value.to_string()).unwrap();
        }
        Self { shape, tensors }
    }

    /// The vector of a text, scaled to length 1.
    pub fn embed(&self, ids: &[u32]) -> Vec<f64> {
        let Shape { hidden, heads, .. } = self.shape;
        let row = |name: &str, row: usize| {
            &self.tensors[&format!("embeddings.{name}.weight")][row * hidden..][..hidden]
        };
        let mut states: Vec<Vec<f64>> = ids
            .iter()
            .enumerate()
            .map(|(position, id)| {
                let of_token = row("word_embeddings", *id as usize);
                let of_place = row("position_embeddings", position);
                let of_type = row("token_type_embeddings", 0);
                let sum = (0..hidden).map(|at| of_token[at] + of_place[at] + of_type[at]).collect();
                self.norm("embeddings.LayerNorm", sum)
            })
            .collect();
        let width = hidden / heads;
        for layer in 0..self.shape.layers {
            let name = format!("encoder.layer.{layer}");
            let project = |which: &str| -> Vec<Vec<f64>> {
                states
                    .iter()
                    .map(|state| self.dense(&format!("{name}.attention.self.{which}"), state))
                    .collect()
            };
            let (queries, keys, values) = (project("query"), project("key"), project("value"));
            let attended = |token: usize| {
                let mut context = vec![0.0; hidden];
                for head in 0..heads {
                    let part = head * width..(head + 1) * width;
                    let score = |key: &Vec<f64>| {
                        let product = queries[token][part.clone()].iter().zip(&key[part.clone()]);
                        product.map(|(a, b)| a * b).sum::<f64>() / (width as f64).sqrt()
                    };
                    let scores: Vec<f64> = keys.iter().map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for (weight, value) in weights.iter().zip(&values) {
                        for at in part.clone() {
                            context[at] += weight / sum * value[at];
                        }
                    }
                }
                context
            };
            let contexts: Vec<Vec<f64>> = (0..ids.len()).map(attended).collect();
            for (state, context) in states.iter_mut().zip(&contexts) {
                let output = self.dense(&format!("{name}.attention.output.dense"), context);
                *state = self.norm(&format!("{name}.attention.output.LayerNorm"), add(state, &output));
                let inner = self.dense(&format!("{name}.intermediate.dense"), state);
                let inner: Vec<f64> = inner.into_iter().map(gelu).collect();
                let output = self.dense(&format!("{name}.output.dense"), &inner);
                *state = self.norm(&format!("{name}.output.LayerNorm"), add(state, &output));
            }
        }
        let pooled = if self.shape.is_cls { 1 } else { ids.len() };
        let mut vector = vec![0.0; hidden];
        for state in &states[..pooled] {
            vector = add(&vector, state);
        }
        let length = vector.iter().map(|number| number * number).sum::<f64>().sqrt();
        vector.into_iter().map(|number| number / length).collect()
    }

    fn dense(&self, name: &str, state: &[f64]) -> Vec<f64> {
        let weights = self.tensors[&format!("{name}.weight")].chunks_exact(state.len());
        let product = |row: &[f64]| row.iter().zip(state).map(|(a, b)| a * b).sum::<f64>();
        weights
            .map(product)
            .zip(&self.tensors[&format!("{name}.bias")])
            .map(|(sum, bias)| sum + bias)
            .collect()
    }

    fn norm(&self, name: &str, state: Vec<f64>) -> Vec<f64> {
        let count = state.len() as f64;
        let mean = state.iter().sum::<f64>() / count;
        let variance = state.iter().map(|number| (number - mean).powi(2)).sum::<f64>() / count;
        let (weight, bias) =
            (&self.tensors[&format!("{name}.weight")], &self.tensors[&format!("{name}.bias")]);
        let normal = state.into_iter().map(|number| (number - mean) / (variance + EPSILON).sqrt());
        normal.zip(weight).zip(bias).map(|((number, weight), bias)| number * weight + bias).collect()
    }
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn gelu(x: f64) -> f64 {
    x * 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

/// The error function, by its Maclaurin series. Where the difference to 1 or -1 does not matter, 1 or -1.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.5 {
        return x.signum();
    }
    let (mut sum, mut power) = (0.0, x);
    for term in 0..120 {
        let term = f64::from(term);
        sum += power / (2.0 * term + 1.0);
        power *= -x * x / (term + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// Appends a number to `bytes`. Returns the number after rounding to the type.
fn put(number: f32, dtype: Dtype, bytes: &mut Vec<u8>) -> f64 {
    let bits = number.to_bits();
    match dtype {
        Dtype::F32 => {
            bytes.extend(number.to_le_bytes());
            f64::from(number)
        }
        Dtype::BF16 => {
            bytes.extend(((bits >> 16) as u16).to_le_bytes());
            f64::from(f32::from_bits(bits & 0xffff_0000))
        }
        Dtype::F16 => {
            // Truncates to ten bits. The numbers are neither very large nor very small.
            let exponent = (bits >> 23 & 0xff).cast_signed() - 127;
            if exponent < -14 {
                bytes.extend([0, 0]);
                return 0.0;
            }
            let half = bits >> 16 & 0x8000 | ((exponent + 15) as u32) << 10 | bits >> 13 & 0x3ff;
            bytes.extend((half as u16).to_le_bytes());
            f64::from(f32::from_bits(bits & 0xffff_e000))
        }
        other => panic!("no model is made up of {other:?}"),
    }
}

#[test]
fn the_error_function_matches_known_values() {
    for (x, y) in [
        (0.0, 0.0),
        (0.5, 0.520_499_877_813_046_5),
        (-1.0, -0.842_700_792_949_714_9),
        (3.0, 0.999_977_909_503_001_4),
    ] {
        assert!((erf(x) - y).abs() < 1e-12, "{x}");
    }
}
