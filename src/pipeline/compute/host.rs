//! A module's registers in host memory.

use candle_core::{Device, Tensor};

use crate::backend::cpu::activation;
use crate::comm::{Header, Receiver, Sender};
use crate::nn::layers::{Pass, Tape};
use crate::nn::module::{Module, pool_for_edge, pool_for_edge_vjp};
use crate::pipeline::head::Head;
use crate::pipeline::worker::{Update, receive, send};
use crate::trainer::state;
use crate::{Error, Result};

/// Tensors that a module works on from one phase of a tick to the next.
#[derive(Default)]
pub struct Host {
    /// This step's activations.
    tape: Tape,
    /// The newest activation of each edge in, held past the end of its sender's clip; for module 1 the frame.
    held: Vec<Option<Tensor>>,
    /// H(a), and the same as an edge out takes it.
    y: Option<Tensor>,
    pooled: Option<Tensor>,
    /// The cotangent that has just come, and the sum of those that came before it: g.
    came: Option<Tensor>,
    g: Option<Tensor>,
    /// Of each input, as the vector–Jacobian product gives it.
    cotangents: Vec<Option<Tensor>>,
    /// This step's target frame.
    target: Option<Tensor>,
    /// Module 1: inputs are frames, which are never held.
    frames: bool,
    /// The module as it was at the last mark. Values are replaced and not changed, so until an update replaces them this takes
    /// no memory.
    marked: Option<Vec<(String, Tensor)>>,
}

impl Host {
    /// Empty registers for a module with `edges` edges in; without any, its input is a frame.
    pub fn new(edges: usize) -> Self {
        Host { held: vec![None; edges.max(1)], frames: edges == 0, ..Host::default() }
    }

    pub(super) fn begin(&mut self) {
        self.held.fill(None);
    }

    pub(super) fn set_input(&mut self, k: usize, tensor: Tensor) {
        self.held[k] = Some(tensor);
    }

    pub(super) fn receive_input(&mut self, k: usize, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        let (tensor, flags) = receive(receiver, due)?;
        self.held[k] = Some(tensor);
        Ok(flags)
    }

    pub(super) fn forward(&mut self, module: &mut Module, pass: &Pass) -> Result<()> {
        let missing = || Error::Run("an input is missing: nothing came that could be held".into());
        let inputs: Vec<Tensor> =
            self.held.iter().map(|held| held.clone().ok_or_else(missing)).collect::<Result<_>>()?;
        self.y = Some(module.forward(&inputs, pass, &mut self.tape)?);
        Ok(())
    }

    fn y(&self) -> Result<&Tensor> {
        self.y.as_ref().ok_or_else(|| Error::Run("there is no output yet".into()))
    }

    pub(super) fn pool(&mut self, _: usize, (fh, fw): (usize, usize)) -> Result<()> {
        self.pooled = Some(pool_for_edge(self.y()?, fh, fw)?);
        Ok(())
    }

    pub(super) fn send_output(&mut self, _: usize, sender: &mut Sender, header: &Header) -> Result<()> {
        let pooled = self.pooled.take();
        send(sender, header, pooled.as_ref().map_or_else(|| self.y(), Ok)?)
    }

    pub(super) fn receive_cotangent(&mut self, _: usize, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        let (tensor, flags) = receive(receiver, due)?;
        self.came = Some(tensor);
        Ok(flags)
    }

    fn came(&mut self) -> Result<Tensor> {
        self.came.take().ok_or_else(|| Error::Run("no cotangent came".into()))
    }

    pub(super) fn cotangent_is_finite(&self) -> Result<bool> {
        self.came.as_ref().map_or(Ok(true), activation::all_finite)
    }

    pub(super) fn clear_cotangent(&mut self) -> Result<()> {
        self.came = Some(self.came()?.zeros_like()?);
        Ok(())
    }

    pub(super) fn add_cotangent(&mut self, (fh, fw): (usize, usize)) -> Result<()> {
        let c = pool_for_edge_vjp(&self.came()?, fh, fw)?;
        self.g = Some(match self.g.take() {
            Some(sum) => activation::add(&sum, &c)?,
            None => c,
        });
        Ok(())
    }

    pub(super) fn has_sum(&self) -> bool {
        self.g.is_some()
    }

    pub(super) fn set_target(&mut self, target: Tensor) {
        self.target = Some(target);
    }

    pub(super) fn receive_target(&mut self, receiver: &mut Receiver, due: &Header) -> Result<()> {
        self.target = Some(receive(receiver, due)?.0);
        Ok(())
    }

    pub(super) fn loss(&mut self, head: &mut Head, training: bool) -> Result<()> {
        let target = self.target.take();
        self.g = head.loss(self.y()?, target.as_ref(), training)?;
        Ok(())
    }

    pub(super) fn leave_loss_out(&mut self) -> Result<()> {
        self.g = Some(self.y()?.zeros_like()?);
        Ok(())
    }

    pub(super) fn vjp(&mut self, module: &mut Module, pass: &Pass, wanted: &[bool]) -> Result<()> {
        let g = self.g.take().ok_or_else(|| Error::Run("there is no cotangent to pull back".into()))?;
        self.cotangents = module.vjp(&g, pass, &mut self.tape, wanted)?;
        Ok(())
    }

    pub(super) fn send_cotangent(&mut self, k: usize, sender: &mut Sender, header: &Header) -> Result<()> {
        match self.cotangents.get_mut(k).and_then(Option::take) {
            Some(c) => send(sender, header, &c),
            None => Ok(()),
        }
    }

    pub(super) fn end_tick(&mut self) {
        self.tape.clear();
        (self.y, self.g) = (None, None);
        self.cotangents.clear();
        if self.frames {
            self.held.fill(None);
        }
    }

    pub(super) fn update(&self, module: &mut Module, update: &mut Update, clip: u64, step: usize) -> Result<()> {
        update.apply(module, clip, step)
    }

    pub(super) fn tally(&self, _: Option<&mut Head>, _: Option<&mut Update>) -> Result<Vec<Error>> {
        Ok(Vec::new())
    }

    pub(super) fn snapshot(
        &self,
        module: &mut Module,
        update: Option<&mut Update>,
        index: usize,
    ) -> Result<Vec<(String, Tensor)>> {
        state::snapshot(module, update.as_deref(), index)
    }

    pub(super) fn mark(&mut self, module: &mut Module, update: Option<&Update>, index: usize) -> Result<()> {
        self.marked = Some(state::snapshot(module, update, index)?);
        Ok(())
    }

    pub(super) fn unmark(&mut self) {
        self.marked = None;
    }

    pub(super) fn rewind(
        &mut self,
        _: &mut Module,
        _: Option<&mut Update>,
        _: usize,
    ) -> Result<Option<Vec<(String, Tensor)>>> {
        Ok(self.marked.take())
    }
}

/// A tensor of one value, of `[B, H, W, C]`.
///
/// # Errors
/// None of its own.
pub fn full(value: f32, batch: usize, [h, w, c]: [usize; 3]) -> Result<Tensor> {
    Ok(Tensor::full(value, (batch, h, w, c), &Device::Cpu)?)
}
