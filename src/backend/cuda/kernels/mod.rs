//! The kernels of `kernels/*.cu`, compiled by NVRTC for the GPU at hand when it is opened.
//!
//! Each is compiled once for each type of activations, as `real`: 32-bit floats, or with `BF16` defined, bfloat16.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};

use super::gpu::{Element, capability, failed};
use crate::{Error, Result};

const SOURCE: &str = concat!(
    include_str!("common.cu"),
    include_str!("elementwise.cu"),
    include_str!("rows.cu"),
    include_str!("norm.cu"),
    include_str!("norm_small.cu"),
    include_str!("pool.cu"),
    include_str!("loss.cu"),
    include_str!("optimizer.cu"),
);

/// Every kernel's name.
const NAMES: &[&str] = &[
    "accumulate",
    "adaptive_average",
    "adaptive_average_vjp",
    "adamw",
    "add",
    "average_pool",
    "average_pool_vjp",
    "bias",
    "column_sums",
    "column_total",
    "copy_channels",
    "cross_entropy",
    "dropout",
    "fill",
    "gelu",
    "gelu_vjp",
    "global_average",
    "global_average_vjp",
    "gradient_norm",
    "gradient_squares",
    "guard_act",
    "guard_look",
    "loss_total",
    "max_pool",
    "max_pool_vjp",
    "max_pool_vjp_tiles",
    "mix_clips",
    "narrow",
    "norm_apply",
    "norm_running",
    "norm_small",
    "norm_statistics",
    "norm_sums",
    "norm_vjp_apply",
    "norm_vjp_coefficients",
    "norm_vjp_small",
    "norm_vjp_sums",
    "pixel_loss",
    "relu",
    "relu_vjp",
    "rmsprop",
    "set_words",
    "moving_average",
    "sgd",
    "spread",
    "spread_vjp",
    "sum_in_order",
    "upsample",
    "upsample_vjp",
    "widen",
];

/// Compiles all kernels for `context`'s GPU.
///
/// # Errors
/// [`Error::Run`] with the compiler's words.
pub fn load(context: &Arc<CudaContext>) -> Result<HashMap<(&'static str, Element), CudaFunction>> {
    let (major, minor) = capability(context)?;
    let mut functions = HashMap::new();
    for element in [Element::F32, Element::Bf16] {
        let module =
            context.load_module(compiled(major, minor, element)?).map_err(|e| failed("loading the kernels", &e))?;
        for name in NAMES {
            let function = module.load_function(name).map_err(|e| failed("finding a kernel", &e))?;
            functions.insert((*name, element), function);
        }
    }
    Ok(functions)
}

/// The kernels for one type of activations, compiled once a process: its workers wait for the first.
fn compiled(major: i32, minor: i32, element: Element) -> Result<Ptx> {
    type Wanted = (i32, i32, Element);
    static DONE: Mutex<Vec<(Wanted, Ptx)>> = Mutex::new(Vec::new());
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    let wanted = (major, minor, element);
    if let Some((_, ptx)) = done.iter().find(|(made_for, _)| *made_for == wanted) {
        return Ok(ptx.clone());
    }
    let mut options = vec![format!("--gpu-architecture=compute_{major}{minor}")];
    if element == Element::Bf16 {
        options.push("--define-macro=BF16".into());
    }
    let options = CompileOptions { options, ..CompileOptions::default() };
    let ptx = compile_ptx_with_opts(SOURCE, options)
        .map_err(|e| Error::Run(format!("NVRTC does not compile the kernels: {e}")))?;
    done.push((wanted, ptx.clone()));
    Ok(ptx)
}
