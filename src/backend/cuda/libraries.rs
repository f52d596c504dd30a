//! CUDA's libraries, which are looked for when a GPU is first asked for.

use crate::{Error, Result};

/// Whether the driver, NVRTC and cuDNN can be loaded.
///
/// # Errors
/// [`Error::Input`] naming what is missing and where to get it.
pub fn check() -> Result<()> {
    // SAFETY: the calls only look for the libraries.
    let (driver, nvrtc, dnn) = unsafe {
        (
            cudarc::driver::sys::is_culib_present(),
            cudarc::nvrtc::sys::is_culib_present(),
            cudarc::cudnn::sys::is_culib_present(),
        )
    };
    let missing: Vec<&str> = [
        (driver, "libcuda (NVIDIA's driver)"),
        (nvrtc, "libnvrtc (the CUDA toolkit, or PyPI's nvidia-cuda-nvrtc)"),
        (dnn, "libcudnn (cuDNN 9, or PyPI's nvidia-cudnn-cu13)"),
    ]
    .into_iter()
    .filter_map(|(found, name)| (!found).then_some(name))
    .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::input(format!(
        "run.device = \"cuda\" needs {}: install it, or put its folder on LD_LIBRARY_PATH; run.device = \"cpu\" does without",
        missing.join(", ")
    )))
}
