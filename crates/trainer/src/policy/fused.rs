//! The policy's small operations, each in one pass forwards and one backwards.
//!
//! Written out in candle's elementary operations, most of a tiny policy's time goes into temporary tensors, into broadcasts and into
//! gradients of constants. Each operation here computes what its formula says and nothing else; `train::tests` holds every gradient
//! against finite differences. On the processor only, as all of the trainer is.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, WithDType};

/// Returns `x / √(mean x² + ε) · weight` over the last dimension of `[n, width]`.
pub(super) fn norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    #[allow(clippy::cast_possible_truncation, reason = "single precision throughout")]
    x.contiguous()?.apply_op2(weight, Norm(epsilon as f32))
}

/// Returns `softmax(scale · scores + mask)` over the last dimension of `[rows, heads, places, keys]`; the mask is
/// `[1 or rows, 1, places, keys]`.
pub(super) fn softmax(scores: &Tensor, mask: &Tensor, scale: f64) -> Result<Tensor> {
    #[allow(clippy::cast_possible_truncation, reason = "single precision throughout")]
    scores.contiguous()?.apply_op2(&mask.contiguous()?, Softmax(scale as f32))
}

/// Turns each head's first half against its second, as Hugging Face's llama does: `[n, heads, size]` by angles `[n, size / 2]`.
pub(super) fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    x.contiguous()?.apply_op3(cos, sin, Rotate)
}

/// Returns `gate · sigmoid(gate) · up`.
pub(super) fn gated(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Gated)
}

/// Returns the natural logarithm of the probability of each row's target, `[rows]`, under logits `[rows, vocabulary]`.
pub(crate) fn logprobs_of(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    logits.contiguous()?.apply_op2(targets, LogProb)
}

fn values<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&storage.as_slice::<T>()?[from..to]),
        None => candle_core::bail!("an operation of the policy needs its values in one piece"),
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

fn out(values: Vec<f32>, shape: &Shape) -> (CpuStorage, Shape) {
    (CpuStorage::F32(values), shape.clone())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

struct Norm(f32);

impl Norm {
    #[allow(clippy::cast_precision_loss, reason = "a policy is far narrower than 2^24")]
    fn inverse_root(&self, row: &[f32]) -> f32 {
        1.0 / (dot(row, row) / row.len() as f32 + self.0).sqrt()
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        "root-mean-square norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (values::<f32>(x, lx)?, values::<f32>(w, lw)?);
        let mut y = Vec::with_capacity(x.len());
        for row in x.chunks_exact(w.len()) {
            let by = self.inverse_root(row);
            y.extend(row.iter().zip(w).map(|(x, w)| x * by * w));
        }
        Ok(out(y, lx.shape()))
    }

    #[allow(clippy::cast_precision_loss, reason = "a policy is far narrower than 2^24")]
    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (xs, ws, gs) = (flat(x)?, flat(w)?, flat(gradient)?);
        let (mut dx, mut dw) = (Vec::with_capacity(xs.len()), vec![0.0; ws.len()]);
        for (row, g) in xs.chunks_exact(ws.len()).zip(gs.chunks_exact(ws.len())) {
            let by = self.inverse_root(row);
            let mut along = 0.0;
            for (((dw, x), w), g) in dw.iter_mut().zip(row).zip(&ws).zip(g) {
                *dw += g * x * by;
                along += g * w * x;
            }
            let back = along * by * by / row.len() as f32;
            dx.extend(row.iter().zip(&ws).zip(g).map(|((x, w), g)| by * (g * w - x * back)));
        }
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dw, w.shape(), w.device())?)))
    }
}

struct Softmax(f32);

impl CustomOp2 for Softmax {
    fn name(&self) -> &'static str {
        "masked softmax"
    }

    fn cpu_fwd(&self, s: &CpuStorage, ls: &Layout, m: &CpuStorage, lm: &Layout) -> Result<(CpuStorage, Shape)> {
        let (scores, mask) = (values::<f32>(s, ls)?, values::<f32>(m, lm)?);
        let (rows, heads, places, keys) = ls.shape().dims4()?;
        let masks = lm.shape().dims4()?;
        if masks != (masks.0, 1, places, keys) || (masks.0 != 1 && masks.0 != rows) {
            candle_core::bail!("a mask {masks:?} does not fit scores {:?}", ls.shape());
        }
        let mut y = Vec::with_capacity(scores.len());
        for (at, row) in scores.chunks_exact(keys).enumerate() {
            let (which, place) = (at / (heads * places) % masks.0, at % places);
            let mask = &mask[(which * places + place) * keys..][..keys];
            let from = y.len();
            y.extend(row.iter().zip(mask).map(|(score, mask)| score * self.0 + mask));
            let y = &mut y[from..];
            let top = y.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for power in &mut *y {
                *power = (*power - top).exp();
                total += *power;
            }
            y.iter_mut().for_each(|power| *power /= total);
        }
        Ok(out(y, ls.shape()))
    }

    fn bwd(&self, s: &Tensor, _: &Tensor, y: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (ys, gs, keys) = (flat(y)?, flat(gradient)?, s.dim(D::Minus1)?);
        let mut ds = Vec::with_capacity(ys.len());
        for (y, g) in ys.chunks_exact(keys).zip(gs.chunks_exact(keys)) {
            let along = dot(y, g);
            ds.extend(y.iter().zip(g).map(|(y, g)| self.0 * y * (g - along)));
        }
        Ok((Some(Tensor::from_vec(ds, s.shape(), s.device())?), None))
    }
}

struct Rotate;

impl CustomOp3 for Rotate {
    fn name(&self) -> &'static str {
        "rotary embedding"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        cos: &CpuStorage,
        lc: &Layout,
        sin: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, cos, sin) = (values::<f32>(x, lx)?, values::<f32>(cos, lc)?, values::<f32>(sin, ls)?);
        let (_, heads, size) = lx.shape().dims3()?;
        let half = size / 2;
        let mut y = Vec::with_capacity(x.len());
        for (at, head) in x.chunks_exact(size).enumerate() {
            let at = at / heads * half;
            let (a, b, cos, sin) = (&head[..half], &head[half..], &cos[at..at + half], &sin[at..at + half]);
            y.extend((0..half).map(|i| a[i] * cos[i] - b[i] * sin[i]));
            y.extend((0..half).map(|i| a[i] * sin[i] + b[i] * cos[i]));
        }
        Ok(out(y, lx.shape()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        // Turned back.
        Ok((Some(gradient.contiguous()?.apply_op3_no_bwd(cos, &sin.neg()?, &Self)?), None, None))
    }
}

struct Gated;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated linear unit"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values::<f32>(gate, lg)?, values::<f32>(up, lu)?);
        Ok(out(gate.iter().zip(up).map(|(gate, up)| gate * sigmoid(*gate) * up).collect(), lg.shape()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gates, ups, gs) = (flat(gate)?, flat(up)?, flat(gradient)?);
        let (mut dgate, mut dup) = (Vec::with_capacity(gs.len()), Vec::with_capacity(gs.len()));
        for ((gate, up), g) in gates.iter().zip(&ups).zip(&gs) {
            let open = sigmoid(*gate);
            dgate.push(g * up * open * (1.0 + gate * (1.0 - open)));
            dup.push(g * gate * open);
        }
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
        Ok((Some(tensor(dgate)?), Some(tensor(dup)?)))
    }
}

struct LogProb;

impl CustomOp2 for LogProb {
    fn name(&self) -> &'static str {
        "log-probability"
    }

    fn cpu_fwd(&self, l: &CpuStorage, ll: &Layout, t: &CpuStorage, lt: &Layout) -> Result<(CpuStorage, Shape)> {
        let (logits, targets) = (values::<f32>(l, ll)?, values::<u32>(t, lt)?);
        let (_, width) = ll.shape().dims2()?;
        let mut y = Vec::with_capacity(targets.len());
        for (row, target) in logits.chunks_exact(width).zip(targets) {
            let Some(chosen) = row.get(*target as usize) else { candle_core::bail!("there is no token {target}") };
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            y.push(chosen - top - row.iter().map(|logit| (logit - top).exp()).sum::<f32>().ln());
        }
        Ok(out(y, lt.shape()))
    }

    fn bwd(&self, l: &Tensor, t: &Tensor, y: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dl, targets, ys, gs) = (flat(l)?, t.to_vec1::<u32>()?, flat(y)?, flat(gradient)?);
        let width = l.dim(D::Minus1)?;
        for (((row, target), y), g) in dl.chunks_exact_mut(width).zip(targets).zip(ys).zip(gs) {
            let target = target as usize;
            let normaliser = row[target] - y;
            row.iter_mut().for_each(|logit| *logit = -g * (*logit - normaliser).exp());
            row[target] += g;
        }
        Ok((Some(Tensor::from_vec(dl, l.shape(), l.device())?), None))
    }
}
