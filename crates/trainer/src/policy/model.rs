//! The llama that is trained: every operation has a backward pass.
//!
//! candle's own root-mean-square norm, rotary embedding and softmax have none, so [`super::fused`] has them.
//! Positions and the attention mask are arguments: training passes right-padded rows under a causal mask, sampling left-padded
//! ones with a cache of keys and values.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use chorus_machine::Rng;

use super::{PolicyConfig, fused};

/// Standard deviation of the initial embedding, which is the output matrix too. All other matrices begin with the inverse root of their
/// inputs: a policy as narrow as these learns several times slower from the 0.02 that large models begin with.
const EMBEDDING_DEVIATION: f64 = 0.05;
/// What a masked attention score becomes. Finite, so that a row without any open place stays a number.
pub(crate) const MASKED: f32 = -1e9;

/// A policy: its shape and its weights, in the names of Hugging Face.
#[derive(Debug)]
pub struct Policy {
    config: PolicyConfig,
    weights: BTreeMap<String, Var>,
    /// Cosines and sines of the rotary embedding, `[positions, head / 2]`.
    rotary: (Tensor, Tensor),
}

/// Keys and values of what was read so far, `[rows, heads, places, head]` for each layer.
#[derive(Debug, Default)]
pub struct Cache(Vec<(Tensor, Tensor)>);

impl Policy {
    /// Makes a policy with random weights; the same seed makes the same weights.
    ///
    /// # Errors
    /// candle's, when a tensor cannot be made.
    pub fn random(config: PolicyConfig, seed: u64) -> Result<Self> {
        let mut rng = Rng::from_u64(seed);
        let weights = shapes(&config)
            .into_iter()
            .map(|(name, shape)| {
                let values = if shape.len() == 1 {
                    vec![1.0; shape[0]]
                } else {
                    let deviation =
                        if name.contains("embed") { EMBEDDING_DEVIATION } else { 1.0 / (shape[1] as f64).sqrt() };
                    normal(&mut rng, shape.iter().product(), deviation)
                };
                Ok((name, Tensor::from_vec(values, shape, &Device::Cpu)?))
            })
            .collect::<Result<_>>()?;
        Self::from_tensors(config, weights)
    }

    /// Makes a policy of given weights.
    ///
    /// # Errors
    /// candle's, when a weight is missing, of another shape, or not finite.
    pub fn from_tensors(config: PolicyConfig, mut tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for (name, shape) in shapes(&config) {
            let Some(tensor) = tensors.remove(&name) else { candle_core::bail!("the policy has no weight {name}") };
            if tensor.dims() != shape {
                candle_core::bail!("{name} has the shape {:?} and needs {shape:?}", tensor.dims());
            }
            let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
            if !tensor.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                candle_core::bail!("{name} holds something that is no number");
            }
            weights.insert(name, Var::from_tensor(&tensor)?);
        }
        let rotary = rotary(&config)?;
        Ok(Self { config, weights, rotary })
    }

    /// Returns its shape.
    #[must_use]
    pub const fn config(&self) -> &PolicyConfig {
        &self.config
    }

    /// Returns its weights by name.
    #[must_use]
    pub const fn weights(&self) -> &BTreeMap<String, Var> {
        &self.weights
    }

    /// Returns how many weights it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.weights.values().map(|weight| weight.elem_count()).sum()
    }

    /// Returns a policy with the same weights that no longer change with this one's.
    ///
    /// # Errors
    /// candle's, when a tensor cannot be made.
    pub fn copy(&self) -> Result<Self> {
        let copy = |(name, weight): (&String, &Var)| Ok((name.clone(), Var::from_tensor(&weight.as_tensor().copy()?)?));
        let weights = self.weights.iter().map(copy).collect::<Result<_>>()?;
        Ok(Self { config: self.config.clone(), weights, rotary: self.rotary.clone() })
    }

    /// Takes over the weights of a policy of the same shape.
    ///
    /// # Errors
    /// candle's, when the shapes differ.
    pub fn set(&self, other: &Self) -> Result<()> {
        self.weights.iter().try_for_each(|(name, weight)| weight.set(other.weight(name)?))
    }

    /// Reads tokens `[rows, places]` at positions `[rows, places]` and returns what it makes of each place, `[rows · places, width]`,
    /// for [`Policy::logits`]. The mask is added to the attention scores and must broadcast to `[rows, 1, places, places read so far
    /// and now]`.
    ///
    /// # Errors
    /// candle's, when shapes do not fit or a position is past the longest sequence.
    pub fn read(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        mask: &Tensor,
        mut cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (rows, places) = tokens.dims2()?;
        let angle = |table: &Tensor| table.index_select(&positions.flatten_all()?, 0);
        let rotary = (angle(&self.rotary.0)?, angle(&self.rotary.1)?);
        let embedding = self.weight("model.embed_tokens.weight")?;
        let mut x = embedding.index_select(&tokens.flatten_all()?, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let normed = self.norm(&x, &name("input_layernorm"))?;
            x = (x + self.attention(layer, &normed, (rows, places), &rotary, mask, cache.as_deref_mut())?)?;
            let normed = self.norm(&x, &name("post_attention_layernorm"))?;
            let gate = linear(&normed, self.weight(&name("mlp.gate_proj"))?)?;
            let wide = fused::gated(&gate, &linear(&normed, self.weight(&name("mlp.up_proj"))?)?)?;
            x = (x + linear(&wide, self.weight(&name("mlp.down_proj"))?)?)?;
        }
        Ok(x)
    }

    /// Returns the logits of what follows places that were read, `[places, vocabulary]`. Only for those whose answer is wanted: the
    /// vocabulary is wider than the policy.
    ///
    /// # Errors
    /// candle's, when shapes do not fit.
    pub fn logits(&self, read: &Tensor) -> Result<Tensor> {
        linear(&self.norm(read, "model.norm.weight")?, self.weight("model.embed_tokens.weight")?)
    }

    fn attention(
        &self,
        layer: usize,
        x: &Tensor,
        (rows, places): (usize, usize),
        rotary: &(Tensor, Tensor),
        mask: &Tensor,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (heads, size) = (self.config.num_attention_heads, self.config.head_size());
        let project = |part: &str| {
            let weight = self.weight(&format!("model.layers.{layer}.self_attn.{part}.weight"))?;
            linear(x, weight)?.reshape((rows * places, heads, size))
        };
        let apart = |x: Tensor| x.reshape((rows, places, heads, size))?.transpose(1, 2)?.contiguous();
        let q = apart(fused::rotate(&project("q_proj")?, rotary)?)?;
        let (mut k, mut v) = (apart(fused::rotate(&project("k_proj")?, rotary)?)?, apart(project("v_proj")?)?);
        if let Some(Cache(layers)) = cache {
            if let Some((old_k, old_v)) = layers.get(layer) {
                (k, v) = (Tensor::cat(&[old_k, &k], 2)?, Tensor::cat(&[old_v, &v], 2)?);
            }
            layers.truncate(layers.len().min(self.config.num_hidden_layers));
            match layers.get_mut(layer) {
                Some(slot) => *slot = (k.clone(), v.clone()),
                None => layers.push((k.clone(), v.clone())),
            }
        }
        #[allow(clippy::cast_precision_loss, reason = "a head is far narrower than 2^52")]
        let scale = 1.0 / (size as f64).sqrt();
        let mixed = fused::softmax(&q.matmul(&k.t()?)?, mask, scale)?.matmul(&v)?;
        let mixed = mixed.transpose(1, 2)?.reshape((rows * places, heads * size))?;
        linear(&mixed, self.weight(&format!("model.layers.{layer}.self_attn.o_proj.weight"))?)
    }

    fn norm(&self, x: &Tensor, weight: &str) -> Result<Tensor> {
        fused::norm(x, self.weight(weight)?, self.config.rms_norm_eps)
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        match self.weights.get(name) {
            Some(weight) => Ok(weight.as_tensor()),
            None => candle_core::bail!("the policy has no weight {name}"),
        }
    }
}

fn shapes(config: &PolicyConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..config.num_hidden_layers {
        let parts = [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden, hidden]),
            ("self_attn.v_proj", vec![hidden, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![wide, hidden]),
            ("mlp.up_proj", vec![wide, hidden]),
            ("mlp.down_proj", vec![hidden, wide]),
        ];
        shapes.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
    }
    shapes
}

/// Draws from a normal distribution (Box and Muller).
fn normal(rng: &mut Rng, count: usize, deviation: f64) -> Vec<f32> {
    #[allow(clippy::cast_possible_truncation, reason = "weights are single precision")]
    let draw = |rng: &mut Rng| {
        let (radius, angle) = ((-2.0 * (1.0 - rng.unit()).ln()).sqrt(), std::f64::consts::TAU * rng.unit());
        (radius * angle.cos() * deviation) as f32
    };
    (0..count).map(|_| draw(rng)).collect()
}

#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "positions and heads are small")]
fn rotary(config: &PolicyConfig) -> Result<(Tensor, Tensor)> {
    let half = config.head_size() / 2;
    let frequency = |i: usize| config.rope_theta.powf(-(i as f64) / half as f64);
    let places = 0..config.max_position_embeddings;
    let angles: Vec<f32> = places.flat_map(|at| (0..half).map(move |i| (at as f64 * frequency(i)) as f32)).collect();
    let angles = Tensor::from_vec(angles, (config.max_position_embeddings, half), &Device::Cpu)?;
    Ok((angles.cos()?, angles.sin()?))
}

/// `[n, in]` times `[out, in]` transposed.
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}
