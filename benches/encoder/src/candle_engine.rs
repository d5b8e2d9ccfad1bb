//! The BERT of candle, in f32.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};

use crate::corpus::ModelFolder;
use crate::engine::Label;
use crate::padded::{Batch, Model, Padded};

pub struct Candle {
    bert: BertModel,
    is_cls: bool,
    width: usize,
}

pub fn load(folder: &ModelFolder, threads: usize) -> Result<Padded<Candle>> {
    let config: Config = serde_json::from_slice(&std::fs::read(folder.path.join("config.json"))?)?;
    let pooling = std::fs::read_to_string(folder.path.join("1_Pooling/config.json")).unwrap_or_default();
    let pooling: serde_json::Value = serde_json::from_str(&pooling).unwrap_or_default();
    let weights = std::fs::read(folder.path.join("model.safetensors"))?;
    let variables = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
    let candle = Candle {
        bert: BertModel::load(variables, &config)?,
        is_cls: pooling["pooling_mode_cls_token"] == true,
        width: config.hidden_size,
    };
    // candle uses all threads of the rayon pool that calls it. So each pool has one thread.
    let pool = || rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pools = (0..threads).map(|_| pool()).collect::<Result<_, _>>()?;
    Ok(Padded::new(candle, pools, folder.tokenizer.clone()))
}

impl Candle {
    fn forward(&self, batch: &Batch) -> candle_core::Result<Vec<f32>> {
        let shape = (batch.texts.len(), batch.longest);
        let ids = Tensor::from_slice(&batch.ids, shape, &Device::Cpu)?;
        let mask = Tensor::from_slice(&batch.mask, shape, &Device::Cpu)?;
        let states = self.bert.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let pooled = if self.is_cls {
            states.narrow(1, 0, 1)?.squeeze(1)?
        } else {
            states.broadcast_mul(&mask.unsqueeze(2)?)?.sum(1)?
        };
        let lengths = pooled.sqr()?.sum_keepdim(1)?.sqrt()?;
        pooled.broadcast_div(&lengths)?.flatten_all()?.to_vec1()
    }
}

impl Model for Candle {
    type Thread = rayon::ThreadPool;

    fn label(&self) -> Label {
        Label { engine: "candle", version: "0.11".into(), precision: "f32".into(), kernel: "-" }
    }

    fn embed(&self, pool: &mut rayon::ThreadPool, batch: &Batch) -> Result<Vec<f32>> {
        Ok(pool.install(|| self.forward(batch))?)
    }

    fn width(&self) -> usize {
        self.width
    }
}
