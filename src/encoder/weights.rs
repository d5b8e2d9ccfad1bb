//! The weights of a BERT model, laid out for two kernels: one for dense layers, one for attention.

use super::aligned_buffer::Buffer;
use super::dense_layer::Dense;
use super::error::Error;
use super::kernel::{ALIGNMENT, Float, Kernel};
use super::model_config::{BertConfig, Description, Pooling};
use super::safetensors_file::{SafetensorsFile, Table};

/// Widths, padded to a multiple that suits all kernels. The padding is zero everywhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widths {
    /// Width of a token's vector: `hidden` without padding, `padded` with padding.
    pub(super) hidden: usize,
    pub(super) padded: usize,
    pub(super) heads: usize,
    pub(super) head: usize,
    /// Width of all heads together.
    pub(super) context: usize,
    pub(super) inner: usize,
}

/// Scale and shift of a layer normalisation, and the bias of the product that follows.
pub(super) struct Norm {
    pub(super) weight: Buffer<f32>,
    pub(super) bias: Buffer<f32>,
    /// The bias of the next dense layer that adds to the same numbers. The norm adds it, so the layer does
    /// not.
    pub(super) next: Buffer<f32>,
}

pub(super) struct Layer<D: Kernel> {
    pub(super) project: Dense<D>,
    pub(super) output: Dense<D>,
    pub(super) attended: Norm,
    pub(super) widen: Dense<D>,
    pub(super) narrow: Dense<D>,
    pub(super) fed: Norm,
}

/// A BERT model with kernel `D` for dense layers and kernel `A` for attention.
pub(super) struct Weights<D: Kernel, A: Float> {
    pub(super) widths: Widths,
    pub(super) epsilon: f32,
    pub(super) pooling: Pooling,
    pub(super) words: Table,
    /// The embedding of each position, plus the embedding of the first token type.
    pub(super) positions: Buffer<f32>,
    pub(super) embedded: Norm,
    pub(super) layers: Vec<Layer<D>>,
    attention: std::marker::PhantomData<A>,
}

impl<D: Kernel, A: Float> Weights<D, A> {
    /// Lays out the weights of a file.
    pub(super) fn new(description: &Description, tensors: &SafetensorsFile) -> Result<Self, Error> {
        let bert = &description.bert;
        check(bert, tensors)?;
        let (hidden, heads) = (bert.hidden_size, bert.num_attention_heads);
        let head = (hidden / heads).next_multiple_of(32);
        let widths = Widths {
            hidden,
            padded: hidden.next_multiple_of(ALIGNMENT),
            heads,
            head,
            context: (heads * head).next_multiple_of(ALIGNMENT),
            inner: bert.intermediate_size.next_multiple_of(ALIGNMENT),
        };
        let reader = WeightsReader { tensors, widths, inner: bert.intermediate_size };
        let mut layers = Vec::with_capacity(bert.num_hidden_layers);
        let mut next = Buffer::zeroed(widths.padded);
        // From the last layer to the first, because each norm needs the bias of the layer after it.
        for number in (0..bert.num_hidden_layers).rev() {
            let (layer, bias) = reader.layer::<D>(&format!("encoder.layer.{number}."), next)?;
            layers.push(layer);
            next = bias;
        }
        layers.reverse();
        let embedded = reader.norm("embeddings.LayerNorm", next)?;
        let positions = reader.positions(bert.max_position_embeddings)?;
        let words = tensors.table("embeddings.word_embeddings.weight", [bert.vocab_size, hidden])?;
        Ok(Self {
            widths,
            epsilon: bert.layer_norm_eps,
            pooling: description.pooling,
            words,
            positions,
            embedded,
            layers,
            attention: std::marker::PhantomData,
        })
    }
}

/// Compares the sizes in the description with the tensors in the file, so that a wrong description cannot
/// make the process allocate more memory than the file needs.
fn check(bert: &BertConfig, tensors: &SafetensorsFile) -> Result<(), Error> {
    let BertConfig { hidden_size: hidden, intermediate_size: inner, .. } = *bert;
    tensors.check("embeddings.word_embeddings.weight", &[bert.vocab_size, hidden])?;
    tensors.check("embeddings.position_embeddings.weight", &[bert.max_position_embeddings, hidden])?;
    for number in (0..bert.num_hidden_layers).rev() {
        let name = format!("encoder.layer.{number}.intermediate.dense.weight");
        tensors.check(&name, &[inner, hidden])?;
    }
    Ok(())
}

/// Reads weights and pads them.
struct WeightsReader<'a> {
    tensors: &'a SafetensorsFile,
    pub(super) widths: Widths,
    inner: usize,
}

impl WeightsReader<'_> {
    /// Reads a layer. Also returns the bias of its attention output, which the norm before the layer adds.
    fn layer<D: Kernel>(&self, name: &str, next: Buffer<f32>) -> Result<(Layer<D>, Buffer<f32>), Error> {
        let Widths { hidden, padded, heads, head, context, inner } = self.widths;
        let dimensions = hidden / heads;
        // Padded position of a head's number.
        let of_heads = |at: usize| at / dimensions * head + at % dimensions;
        let mut project = UnpackedDense::zeroed(3 * context, padded);
        for (part, which) in ["query", "key", "value"].into_iter().enumerate() {
            let weight = self.read(&format!("{name}attention.self.{which}.weight"), &[hidden, hidden])?;
            let bias = self.read(&format!("{name}attention.self.{which}.bias"), &[hidden])?;
            // Attention divides scores by the square root of the dimensions, and exp2 is cheaper than exp.
            let factor = match part {
                0 => std::f32::consts::LOG2_E / (dimensions as f32).sqrt(),
                _ => 1.0,
            };
            for (column, weights) in weight.chunks_exact(hidden).enumerate() {
                let to = part * context + of_heads(column);
                project.set(
                    to,
                    weights.iter().map(|weight| weight * factor).enumerate(),
                    bias[column] * factor,
                );
            }
        }
        let dense = |name: &str, rows: usize, depth: usize| -> Result<(Vec<f32>, Vec<f32>), Error> {
            Ok((
                self.read(&format!("{name}.weight"), &[rows, depth])?,
                self.read(&format!("{name}.bias"), &[rows])?,
            ))
        };
        let (weight, bias) = dense(&format!("{name}attention.output.dense"), hidden, hidden)?;
        let mut output = UnpackedDense::zeroed(padded, context);
        for (column, weights) in weight.chunks_exact(hidden).enumerate() {
            let weights = weights.iter().enumerate().map(|(at, weight)| (of_heads(at), *weight));
            output.set(column, weights, bias[column]);
        }
        let (weight, bias) = dense(&format!("{name}intermediate.dense"), self.inner, hidden)?;
        let mut widen = UnpackedDense::zeroed(inner, padded);
        for (column, weights) in weight.chunks_exact(hidden).enumerate() {
            widen.set(column, weights.iter().copied().enumerate(), bias[column]);
        }
        let (weight, bias) = dense(&format!("{name}output.dense"), hidden, self.inner)?;
        let mut narrow = UnpackedDense::zeroed(padded, inner);
        for (column, weights) in weight.chunks_exact(self.inner).enumerate() {
            narrow.set(column, weights.iter().copied().enumerate(), bias[column]);
        }
        let (output, output_bias) = output.without_bias::<D>();
        let (narrow, narrow_bias) = narrow.without_bias::<D>();
        let layer = Layer {
            project: project.with_bias(),
            output,
            attended: self.norm(&format!("{name}attention.output.LayerNorm"), narrow_bias)?,
            widen: widen.with_bias(),
            narrow,
            fed: self.norm(&format!("{name}output.LayerNorm"), next)?,
        };
        Ok((layer, output_bias))
    }

    fn norm(&self, name: &str, next: Buffer<f32>) -> Result<Norm, Error> {
        let padded = |numbers: &[f32]| {
            let mut buffer = Buffer::zeroed(self.widths.padded);
            buffer.as_mut_slice()[..numbers.len()].copy_from_slice(numbers);
            buffer
        };
        let read = |part: &str| self.read(&format!("{name}.{part}"), &[self.widths.hidden]);
        Ok(Norm { weight: padded(&read("weight")?), bias: padded(&read("bias")?), next })
    }

    fn positions(&self, count: usize) -> Result<Buffer<f32>, Error> {
        let Widths { hidden, padded, .. } = self.widths;
        let positions = self.read("embeddings.position_embeddings.weight", &[count, hidden])?;
        // Texts have the first token type. The number of types differs between models.
        let types = self.tensors.read_first_row("embeddings.token_type_embeddings.weight", hidden)?;
        let mut table = Buffer::zeroed(count * padded);
        let rows = table.as_mut_slice().chunks_exact_mut(padded).zip(positions.chunks_exact(hidden));
        for (to, from) in rows {
            for ((to, from), kind) in to.iter_mut().zip(from).zip(&types) {
                *to = from + kind;
            }
        }
        Ok(table)
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        self.tensors.read(name, shape)
    }
}

/// A dense layer before the layout, column after column.
struct UnpackedDense {
    numbers: Vec<f32>,
    depth: usize,
    bias: Buffer<f32>,
}

impl UnpackedDense {
    fn zeroed(columns: usize, depth: usize) -> Self {
        Self { numbers: vec![0.0; columns * depth], depth, bias: Buffer::zeroed(columns) }
    }

    fn set(&mut self, column: usize, weights: impl Iterator<Item = (usize, f32)>, bias: f32) {
        let to = &mut self.numbers[column * self.depth..][..self.depth];
        for (at, weight) in weights {
            to[at] = weight;
        }
        self.bias.as_mut_slice()[column] = bias;
    }

    fn with_bias<D: Kernel>(self) -> Dense<D> {
        Dense::new(&self.numbers, self.depth, self.bias)
    }

    /// The layer without its bias, and the bias, which the norm before the layer adds.
    fn without_bias<D: Kernel>(self) -> (Dense<D>, Buffer<f32>) {
        let none = Buffer::zeroed(self.bias.len());
        (Dense::new(&self.numbers, self.depth, none), self.bias)
    }
}
