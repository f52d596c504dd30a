//! Passes as CUDA graphs: captured at their second use, and replayed.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::capture;
use super::gpu::{Gpu, failed};
use crate::Result;

/// A pass, captured or on its way to it.
#[derive(Default)]
pub enum Captured {
    /// Never run: the first run is launched kernel by kernel, since libraries may do something once.
    #[default]
    New,
    /// Run once: the next is captured.
    Warm,
    /// To be replayed: its parts, with the mark behind each but the last.
    Ready(Vec<(CudaGraph, Option<usize>)>),
}

/// Where a pass that is being launched may be cut into parts.
pub struct Cuts<'a> {
    gpu: &'a Gpu,
    /// The parts captured so far, where it is captured.
    captured: Option<Vec<(CudaGraph, Option<usize>)>>,
    behind: &'a mut dyn FnMut(usize) -> Result<()>,
}

impl Cuts<'_> {
    /// A part ends here: something that is no part of the pass is launched behind it, as `mark` says.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the part cannot be captured or launched; those of what comes behind.
    pub fn cut(&mut self, mark: usize) -> Result<()> {
        self.end(Some(mark))?;
        (self.behind)(mark)?;
        if self.captured.is_some() { begin(self.gpu) } else { Ok(()) }
    }

    /// Ends the capture of a part, if it is captured, and launches it.
    fn end(&mut self, mark: Option<usize>) -> Result<()> {
        let Some(captured) = &mut self.captured else { return Ok(()) };
        // A value of the enumeration that stands for no flag does not exist.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        let graph = self.gpu.compute.end_capture(flags).map_err(|e| failed("making a graph", &e))?;
        if let Some(graph) = graph {
            launch(&graph)?;
            captured.push((graph, mark));
        }
        Ok(())
    }
}

impl Captured {
    /// Launches what `pass` launches: itself, or as graphs of it where `graphs` are wanted. `behind` is called behind every part that
    /// `pass` cuts off.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if a launch fails; those of `pass` and `behind`.
    pub fn run(
        self,
        gpu: &Gpu,
        graphs: bool,
        pass: impl FnOnce(&mut Cuts) -> Result<()>,
        behind: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Self> {
        match self {
            Captured::New => {
                pass(&mut Cuts { gpu, captured: None, behind })?;
                Ok(if graphs { Captured::Warm } else { Captured::New })
            }
            Captured::Warm => {
                let _capturing = capture::capturing();
                let mut cuts = Cuts { gpu, captured: Some(Vec::new()), behind };
                begin(gpu)?;
                let launched = pass(&mut cuts);
                // In any case, or the stream stays captured.
                let ended = cuts.end(None);
                launched.and(ended)?;
                Ok(Captured::Ready(cuts.captured.unwrap_or_default()))
            }
            Captured::Ready(parts) => {
                for (graph, mark) in &parts {
                    launch(graph)?;
                    mark.map_or(Ok(()), &mut *behind)?;
                }
                Ok(Captured::Ready(parts))
            }
        }
    }
}

fn begin(gpu: &Gpu) -> Result<()> {
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    gpu.compute.begin_capture(mode).map_err(|e| failed("capturing a graph", &e))
}

fn launch(graph: &CudaGraph) -> Result<()> {
    graph.launch().map_err(|e| failed("launching a graph", &e))
}
