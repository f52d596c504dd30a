//! Where a module's tensors live and its passes run: in host memory, or on a GPU.
//!
//! A tick names what is to be done with a module's registers (its inputs, output, and cotangents), a clip's end what with
//! its parameters; which memory they are in only these functions know. On a GPU they launch and return: nothing is waited for
//! but messages, and what a clip has counted.

#[cfg(feature = "cuda")]
mod device;
mod host;

use candle_core::Tensor;

use super::head::Head;
use super::worker::Update;
use crate::comm::{Header, Receiver, Sender};
use crate::nn::layers::Pass;
use crate::nn::module::Module;
use crate::{Error, Result};

#[cfg(feature = "cuda")]
pub use device::{Device, Making, Route, Routes};
#[cfg(feature = "cuda")]
pub(crate) use device::{Incoming, Outgoing};
pub use host::{Host, full};

/// A module's registers and what computes on them. Edges in and out count from 0, main first, then growing span.
pub enum Compute {
    /// Host memory, and the calling thread.
    Host(Host),
    /// A GPU's memory and streams.
    #[cfg(feature = "cuda")]
    Device(Box<Device>),
}

/// Calls the same method on whichever variant there is.
macro_rules! each {
    ($compute:expr, $x:ident => $body:expr) => {
        match $compute {
            Compute::Host($x) => $body,
            #[cfg(feature = "cuda")]
            Compute::Device($x) => $body,
        }
    };
}

impl Compute {
    /// Whether passes run on the calling thread.
    pub fn is_host(&self) -> bool {
        matches!(self, Compute::Host(_))
    }

    /// Begins a clip: what was held is forgotten.
    pub fn begin(&mut self) {
        each!(self, x => x.begin());
    }

    /// The clip's labels (`[B]`, −1 for padding), where the loss is.
    ///
    /// # Errors
    /// [`Error::Run`] if they cannot be copied.
    pub fn set_labels(&mut self, head: &mut Head, labels: &[i32]) -> Result<()> {
        head.begin(labels);
        match self {
            Compute::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Device(x) => x.set_labels(labels),
        }
    }

    /// Takes input `k` from the host: module 1's frame.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be copied.
    pub fn set_input(&mut self, k: usize, tensor: Tensor) -> Result<()> {
        match self {
            Compute::Host(x) => {
                x.set_input(k, tensor);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Compute::Device(x) => x.set_input(k, &tensor),
        }
    }

    /// Waits for input `k`; the message's flags.
    ///
    /// # Errors
    /// [`Error::Transport`] if it does not come.
    pub fn receive_input(&mut self, k: usize, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        each!(self, x => x.receive_input(k, receiver, due))
    }

    /// y = H(inputs).
    ///
    /// # Errors
    /// As [`Module::forward`]; [`Error::Run`] where an input never came.
    pub fn forward(&mut self, module: &mut Module, pass: &Pass) -> Result<()> {
        each!(self, x => x.forward(module, pass))
    }

    /// Averages y by whole factors, for the edge out it is sent along next.
    ///
    /// # Errors
    /// As [`crate::nn::module::pool_for_edge`].
    pub fn pool(&mut self, k: usize, factors: (usize, usize)) -> Result<()> {
        each!(self, x => x.pool(k, factors))
    }

    /// Sends y, or what [`Compute::pool`] has made of it, along edge out `k`.
    ///
    /// # Errors
    /// As [`Sender::send`].
    pub fn send_output(&mut self, k: usize, sender: &mut Sender, header: &Header) -> Result<()> {
        each!(self, x => x.send_output(k, sender, header))
    }

    /// Waits for the cotangent of edge out `k`; the message's flags.
    ///
    /// # Errors
    /// [`Error::Transport`] if it does not come.
    pub fn receive_cotangent(&mut self, k: usize, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        each!(self, x => x.receive_cotangent(k, receiver, due))
    }

    /// Whether the cotangent that has come is finite. A GPU answers when the clip ends: it counts those that are not, and
    /// leaves them out itself where that is asked for.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be looked at.
    pub fn cotangent_is_finite(&mut self) -> Result<bool> {
        match self {
            Compute::Host(x) => x.cotangent_is_finite(),
            #[cfg(feature = "cuda")]
            Compute::Device(x) => x.guard_cotangent().map(|()| true),
        }
    }

    /// Zeros in place of the cotangent that has come.
    ///
    /// # Errors
    /// [`Error::Run`] if none has.
    pub fn clear_cotangent(&mut self) -> Result<()> {
        match self {
            Compute::Host(x) => x.clear_cotangent(),
            #[cfg(feature = "cuda")]
            Compute::Device(_) => Ok(()),
        }
    }

    /// Adds the cotangent that has come to g, spread over the pixels that were averaged.
    ///
    /// # Errors
    /// [`Error::Run`] if none has come.
    pub fn add_cotangent(&mut self, factors: (usize, usize)) -> Result<()> {
        each!(self, x => x.add_cotangent(factors))
    }

    /// Whether g holds something.
    pub fn has_sum(&self) -> bool {
        each!(self, x => x.has_sum())
    }

    /// Takes the step's target frame from the host.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be copied.
    pub fn set_target(&mut self, target: Tensor) -> Result<()> {
        match self {
            Compute::Host(x) => {
                x.set_target(target);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Compute::Device(x) => x.set_target(&target),
        }
    }

    /// Waits for the step's target frame.
    ///
    /// # Errors
    /// [`Error::Transport`] if it does not come.
    pub fn receive_target(&mut self, receiver: &mut Receiver, due: &Header) -> Result<()> {
        each!(self, x => x.receive_target(receiver, due))
    }

    /// The loss of y, and in training its gradient as g. A GPU's losses reach the head when the clip ends.
    ///
    /// # Errors
    /// As [`Head::loss`].
    pub fn loss(&mut self, head: &mut Head, training: bool) -> Result<()> {
        each!(self, x => x.loss(head, training))
    }

    /// Zeros in place of a loss's gradient.
    ///
    /// # Errors
    /// [`Error::Run`] if there is no output.
    pub fn leave_loss_out(&mut self) -> Result<()> {
        match self {
            Compute::Host(x) => x.leave_loss_out(),
            #[cfg(feature = "cuda")]
            Compute::Device(_) => Ok(()),
        }
    }

    /// One vector–Jacobian product of the module with g, at this step's activations.
    ///
    /// # Errors
    /// As [`Module::vjp`].
    pub fn vjp(&mut self, module: &mut Module, pass: &Pass, wanted: &[bool]) -> Result<()> {
        each!(self, x => x.vjp(module, pass, wanted))
    }

    /// Sends the cotangent of input `k`, if it was wanted.
    ///
    /// # Errors
    /// As [`Sender::send`].
    pub fn send_cotangent(&mut self, k: usize, sender: &mut Sender, header: &Header) -> Result<()> {
        each!(self, x => x.send_cotangent(k, sender, header))
    }

    /// Waits until what was sent past the links has left.
    ///
    /// # Errors
    /// [`Error::Transport`] if a receiver is gone.
    pub fn flush(&mut self) -> Result<()> {
        match self {
            Compute::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Device(x) => x.flush(),
        }
    }

    /// Ends a tick: this step's activations are forgotten, and the frame.
    pub fn end_tick(&mut self) {
        each!(self, x => x.end_tick());
    }

    /// One update of the parameters by the mean of the gradients since the last one, at the learning rate of `clip`. Whether
    /// the gradient was finite a GPU says when the clip ends, and leaves the update out if it was not.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the gradient is not finite; [`Error::Transport`] if a replica is gone.
    pub fn update(&mut self, module: &mut Module, update: &mut Update, clip: u64, step: usize) -> Result<()> {
        each!(self, x => x.update(module, update, clip, step))
    }

    /// At a clip's end, what a GPU has counted in it: the loss goes to `head`, the gradient's norm to `update`. The errors
    /// about values that are not finite which only then show.
    ///
    /// # Errors
    /// [`Error::Run`] if anything launched before failed.
    pub fn tally(&mut self, head: Option<&mut Head>, update: Option<&mut Update>) -> Result<Vec<Error>> {
        each!(self, x => x.tally(head, update))
    }

    /// The module, number `index`, as it is: what a checkpoint holds of it (see [`crate::trainer::state::snapshot`]).
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be copied.
    pub fn snapshot(
        &mut self,
        module: &mut Module,
        update: Option<&mut Update>,
        index: usize,
    ) -> Result<Vec<(String, Tensor)>> {
        each!(self, x => x.snapshot(module, update, index))
    }

    /// Remembers the module as it is, to go back to it.
    ///
    /// # Errors
    /// [`Error::Run`] if there is no memory for it.
    pub fn mark(&mut self, module: &mut Module, update: Option<&Update>, index: usize) -> Result<()> {
        each!(self, x => x.mark(module, update, index))
    }

    /// Forgets what was remembered.
    pub fn unmark(&mut self) {
        match self {
            Compute::Host(x) => x.unmark(),
            // The memory is kept for the next mark.
            #[cfg(feature = "cuda")]
            Compute::Device(_) => {}
        }
    }

    /// The module as it was at the last [`Compute::mark`], if that was not forgotten. What becomes of `module` is left open.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be copied.
    pub fn rewind(
        &mut self,
        module: &mut Module,
        update: Option<&mut Update>,
        index: usize,
    ) -> Result<Option<Vec<(String, Tensor)>>> {
        each!(self, x => x.rewind(module, update, index))
    }
}
