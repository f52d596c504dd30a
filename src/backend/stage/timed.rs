//! A stage that takes a set time and computes nothing: what remains of a tick is what messages and waits cost.

use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::{BatchEnd, Lent, NotFinite, Snapshot, Stage, StageSpec, Updated};
use crate::Result;
use crate::backend::cpu::mix::Mixing;
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::method::Keep;
use crate::nn::head::Labels;
use crate::nn::layers::Pass;

/// Stands in for a module: messages come, go and are looked at as a module's are.
pub struct TimedStage {
    spec: StageSpec,
    /// Of a forward pass, and of a backward pass.
    pass: Duration,
    /// Whether the processor is busy meanwhile, or the thread asleep.
    busy: bool,
    steps: u64,
}

impl TimedStage {
    /// A stage whose forward pass and backward pass take `pass` each.
    pub fn new(spec: StageSpec, pass: Duration, busy: bool) -> Self {
        TimedStage { spec, pass, busy, steps: 0 }
    }

    fn work(&self) {
        if !self.busy {
            return std::thread::sleep(self.pass);
        }
        let start = Instant::now();
        while start.elapsed() < self.pass {
            std::hint::spin_loop();
        }
    }
}

/// Reads from every cache line.
fn look_at(message: Slot<'_>) -> Done {
    if let Slot::Host(values) = message {
        std::hint::black_box(values.iter().step_by(16).sum::<f32>());
    }
    Done::Now
}

fn fill(message: SlotMut<'_>) -> Done {
    if let SlotMut::Host(values) = message {
        values.fill(1.0);
    }
    Done::Now
}

impl Stage for TimedStage {
    fn begin(&mut self, _: Option<&Labels>, _: bool) -> Result<()> {
        Ok(())
    }

    fn set_input(&mut self, _: usize, _: Tensor, _: Option<Mixing>) -> Result<()> {
        Ok(())
    }

    fn receive(&mut self, _: usize, message: Slot<'_>) -> Result<Done> {
        Ok(look_at(message))
    }

    fn forward(&mut self, _: usize, _: &Pass, _: Keep, _: &[bool]) -> Result<()> {
        self.work();
        Ok(())
    }

    fn send(&mut self, _: usize, message: SlotMut<'_>) -> Result<Done> {
        Ok(fill(message))
    }

    fn output(&mut self) -> Result<Tensor> {
        let [h, w, c] = self.spec.output;
        Ok(Tensor::zeros((self.spec.batch, h, w, c), candle_core::DType::F32, &Device::Cpu)?)
    }

    fn loss(&mut self, _: usize, target: Option<Slot<'_>>) -> Result<(Done, Option<NotFinite>)> {
        Ok((target.map_or(Done::Now, look_at), None))
    }

    fn add_cotangent(&mut self, _: usize, _: usize, message: Slot<'_>) -> Result<(Done, Option<NotFinite>)> {
        Ok((look_at(message), None))
    }

    fn backward(&mut self, _: usize, _: &Pass, _: &[bool]) -> Result<()> {
        if self.spec.recompute {
            self.work();
        }
        self.work();
        self.steps += 1;
        Ok(())
    }

    fn send_cotangent(&mut self, _: usize, message: SlotMut<'_>) -> Result<Done> {
        Ok(fill(message))
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn gradients(&mut self) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }

    fn lend(&mut self) -> Result<Lent> {
        Ok(Lent::new(Vec::new()))
    }

    fn put(&mut self, _: &mut Lent, _: &Range<usize>) -> Result<()> {
        Ok(())
    }

    fn take_back(&mut self, _: Lent) -> Result<()> {
        Ok(())
    }

    fn update(&mut self, _: f64, _: f64, _: Option<f64>) -> Result<Updated> {
        self.steps = 0;
        Ok(Updated::default())
    }

    fn end(&mut self) -> Result<BatchEnd> {
        Ok(BatchEnd::default())
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        Ok(Snapshot::new())
    }

    fn mark(&mut self) -> Result<()> {
        Ok(())
    }

    fn unmark(&mut self) {}

    fn rewind(&mut self) -> Result<Option<Snapshot>> {
        Ok(None)
    }

    fn needs_core(&self) -> bool {
        self.busy
    }
}
