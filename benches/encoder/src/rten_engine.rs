//! The engine rten, on the exported ONNX graph.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use rten::{ModelOptions, NodeId, RunOptions, ThreadPool};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensor, NdTensorView};

use crate::corpus::ModelFolder;
use crate::engine::Label;
use crate::padded::{Batch, Model, Padded};

pub struct Rten {
    model: rten::Model,
    precision: &'static str,
    width: usize,
    inputs: [NodeId; 2],
    output: NodeId,
}

pub fn load(
    folder: &ModelFolder,
    graph: &Path,
    precision: &'static str,
    threads: usize,
) -> Result<Padded<Rten>> {
    let model = ModelOptions::with_all_ops().prepack_weights(true).load_file(graph)?;
    let inputs = [model.node_id("ids")?, model.node_id("mask")?];
    let output = *model.output_ids().first().context("the graph has no output")?;
    let rten = Rten { model, precision, width: folder.width, inputs, output };
    let pools = (0..threads).map(|_| Arc::new(ThreadPool::with_num_threads(1))).collect();
    Ok(Padded::new(rten, pools, folder.tokenizer.clone()))
}

impl Model for Rten {
    type Thread = Arc<ThreadPool>;

    fn label(&self) -> Label {
        Label { engine: "rten", version: "0.27".into(), precision: self.precision.into(), kernel: "-" }
    }

    fn embed(&self, pool: &mut Arc<ThreadPool>, batch: &Batch) -> Result<Vec<f32>> {
        let shape = [batch.texts.len(), batch.longest];
        let ids: Vec<i32> = batch.ids.iter().map(|id| id.cast_signed()).collect();
        let ids = NdTensor::from_data(shape, ids);
        let mask = NdTensorView::from_data(shape, batch.mask.as_slice());
        let options = RunOptions::default().with_thread_pool(Some(Arc::clone(pool)));
        let inputs = vec![(self.inputs[0], ids.into()), (self.inputs[1], mask.into())];
        let [vectors] = self.model.run_n(inputs, [self.output], Some(options))?;
        let vectors: NdTensor<f32, 2> =
            vectors.try_into().map_err(|error| anyhow!("the graph's output is not a matrix: {error}"))?;
        Ok(vectors.to_vec())
    }

    fn width(&self) -> usize {
        self.width
    }
}
