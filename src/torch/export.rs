//! A checkpoint's network for PyTorch: a folder with a safetensors file and a program that reads it.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::program::program;
use crate::backend::stage::EMA;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::network::Network;
use crate::sys::files::write_whole;
use crate::{Error, Result};

/// The files of a folder: weights, and the program.
const FILES: [&str; 2] = ["model.safetensors", "model.py"];

/// Writes the network of `checkpoint`, as `config` describes it, into the folder `dir`: `model.safetensors` with every parameter and
/// running statistic under the name that it has here, and `model.py`, which computes with them. Where there is a moving average of a
/// parameter that is taken, unless `raw`. Returns the two files.
///
/// # Errors
/// [`Error::Input`] where one of the files is there already, or the checkpoint is of another network; [`Error::Io`] if the disk refuses.
pub fn export(checkpoint: &Checkpoint, config: &Config, raw: bool, dir: &Path) -> Result<[PathBuf; 2]> {
    let manifest = checkpoint.manifest();
    let network = Network::new(config, manifest.input, manifest.class_names.len(), 1)?;
    let files = FILES.map(|name| dir.join(name));
    if let Some(file) = files.iter().find(|file| file.exists()) {
        return Err(Error::input(format!(
            "{}: it is there already; choose another folder (--out), or remove it",
            file.display()
        )));
    }
    let tensors = tensors(checkpoint, &network, raw)?;
    // Without it, some readers do not take the file for PyTorch's.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let content = safetensors::serialize(tensors.iter().map(|(name, tensor)| (name, tensor)), Some(metadata))
        .map_err(|e| Error::io(&files[0], std::io::Error::other(e)))?;
    let averaged = config.train.ema.is_some() && !raw;
    let source = format!(
        "The network of {}, after {} batches, in PyTorch{}.",
        checkpoint.path().display(),
        manifest.batches,
        if averaged { ": the moving average of its parameters" } else { "" }
    );
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    write_whole(&files[0], &content)?;
    write_whole(&files[1], program(&network, config, &manifest.class_names, &source).as_bytes())?;
    Ok(files)
}

/// What the network computes with, module by module.
fn tensors(checkpoint: &Checkpoint, network: &Network, raw: bool) -> Result<Vec<(String, Tensor)>> {
    let mut all = Vec::new();
    for i in 1..=network.graph.modules() {
        let wanted = network.tensors(i);
        let own = |name: &str| wanted.iter().any(|tensor| tensor.name == name.strip_prefix(EMA).unwrap_or(name));
        let mut found = checkpoint.load(own)?;
        for tensor in wanted {
            let average = found.remove(&format!("{EMA}{}", tensor.name)).filter(|_| !raw);
            let value = average.or(found.remove(&tensor.name)).filter(|value| value.dims() == tensor.shape);
            let value = value.ok_or_else(|| {
                Error::input(format!(
                    "{}: it has no parameter {} of shape {:?}: the checkpoint is of another network",
                    checkpoint.path().display(),
                    tensor.name,
                    tensor.shape
                ))
            })?;
            all.push((tensor.name, value));
        }
    }
    Ok(all)
}
