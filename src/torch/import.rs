//! Initial weights out of a safetensors file: what of it a network can take, and what not and why.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::torchvision::{self, Part};
use crate::network::Network;
use crate::nn::spec::NormKind;
use crate::nn::tensors::TensorSpec;
use crate::sys::files::read;
use crate::{Error, Result};

/// A file of weights, compared with a network.
#[derive(Clone, Debug)]
pub struct Import {
    path: PathBuf,
    /// The names there of the tensors that are taken, by their names here.
    taken: BTreeMap<String, String>,
    /// Names of what is not taken, by the reason.
    left: BTreeMap<Reason, Vec<String>>,
    /// The network's tensors that keep their initial values.
    anew: Vec<String>,
}

/// Why a tensor of the file is not taken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// Its shape is the first, and the second is needed.
    Shape(Vec<usize>, Vec<usize>),
    /// Its elements are of this type.
    Type(String),
    /// It is a batch norm's, and the network has a group norm there.
    Norm,
    /// How many batches a batch norm has seen.
    Counter,
    /// There is nothing that it is called after.
    Nowhere,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Shape(there, here) => write!(f, "of shape {there:?}, while the network needs {here:?}"),
            Reason::Type(name) => write!(f, "of type {name}, which are no weights"),
            Reason::Norm => f.write_str(
                "of batch norms, while the network has group norms there, whose scales and shifts belong to other statistics",
            ),
            Reason::Counter => f.write_str("counts of batches, which nothing here needs"),
            Reason::Nowhere => f.write_str("that the network has no place for"),
        }
    }
}

impl Import {
    /// Compares the file `path` with `network`: its tensors are called as here, or as torchvision calls a ResNet's.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read, is no safetensors file, or has nothing that the network can take.
    pub fn new(path: &Path, network: &Network) -> Result<Self> {
        let content = content(path)?;
        let file = parsed(path, &content)?;
        let there: BTreeMap<&str, Found> = file
            .iter()
            .map(|(name, view)| (name, Found { dtype: view.dtype(), shape: view.shape().to_vec() }))
            .collect();
        let here: Vec<TensorSpec> = (1..=network.graph.modules()).flat_map(|i| network.tensors(i)).collect();
        let names = Names::of(&there, &here, network);
        let mut import =
            Import { path: path.to_path_buf(), taken: BTreeMap::new(), left: BTreeMap::new(), anew: Vec::new() };
        let mut reasons: HashMap<String, Reason> = HashMap::new();
        for tensor in here {
            let name = names.there(&tensor.name).filter(|name| there.contains_key(name.as_str()));
            match name.map(|name| (names.refused(&name, &there[name.as_str()], &tensor), name)) {
                Some((None, name)) => {
                    import.taken.insert(tensor.name, name);
                    continue;
                }
                Some((Some(reason), name)) => {
                    reasons.insert(name, reason);
                }
                None => {}
            }
            import.anew.push(tensor.name);
        }
        let taken: HashSet<&String> = import.taken.values().collect();
        for name in there.keys().map(|name| name.to_string()).filter(|name| !taken.contains(name)) {
            let reason = reasons.remove(&name).unwrap_or_else(|| match () {
                () if name.ends_with("num_batches_tracked") => Reason::Counter,
                () if names.is_of_group_norm(&name) => Reason::Norm,
                () => Reason::Nowhere,
            });
            import.left.entry(reason).or_default().push(name);
        }
        match import.taken.is_empty() {
            false => Ok(import),
            true => Err(Error::input(format!(
                "train.init: {}: nothing in it fits the network: {}",
                path.display(),
                if names.are_known() { import.told().join("; ") } else { unknown(&there) }
            ))),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is taken, what is not and why, and what keeps its initial values: a sentence each.
    pub fn told(&self) -> Vec<String> {
        let taken = |(here, there): (&String, &String)| match here == there {
            true => here.clone(),
            false => format!("{there} as {here}"),
        };
        let mut told = Vec::new();
        if !self.taken.is_empty() {
            let names: Vec<String> = self.taken.iter().map(taken).collect();
            told.push(format!("{} tensors taken: {}", names.len(), names.join(", ")));
        }
        for (reason, names) in &self.left {
            told.push(format!("{} not taken, {reason}: {}", names.len(), names.join(", ")));
        }
        if !self.anew.is_empty() {
            told.push(format!(
                "{} of the network keep their initial values: {}",
                self.anew.len(),
                self.anew.join(", ")
            ));
        }
        told
    }

    /// Whether the network has all its tensors from the file, and the file no others that are weights.
    pub fn is_whole(&self) -> bool {
        self.anew.is_empty() && self.left.keys().all(|reason| *reason == Reason::Counter)
    }

    /// The tensors that are taken and whose names here `wanted` accepts, in 32-bit floats.
    ///
    /// # Errors
    /// [`Error::Input`] where the file cannot be read, or is another one by now.
    pub fn load(&self, wanted: impl Fn(&str) -> bool) -> Result<HashMap<String, Tensor>> {
        let own: Vec<_> = self.taken.iter().filter(|(here, _)| wanted(here)).collect();
        if own.is_empty() {
            return Ok(HashMap::new());
        }
        let content = content(&self.path)?;
        let file = parsed(&self.path, &content)?;
        let tensor = |(here, there): (&String, &String)| {
            let wrong = |e: String| Error::input(format!("train.init: {}: {there}: {e}", self.path.display()));
            let view = file.tensor(there).map_err(|e| wrong(e.to_string()))?;
            let tensor = view.load(&Device::Cpu).and_then(|tensor| tensor.to_dtype(DType::F32));
            Ok((here.clone(), tensor.map_err(|e| wrong(e.to_string()))?))
        };
        own.into_iter().map(tensor).collect()
    }
}

/// A tensor of the file.
struct Found {
    dtype: Dtype,
    shape: Vec<usize>,
}

/// By what names a file calls a network's tensors.
enum Names {
    /// Those that they have here.
    Own,
    /// Torchvision's, of these parts of a network.
    Torchvision(Vec<Part>),
    /// Others.
    Unknown,
}

impl Names {
    fn of(there: &BTreeMap<&str, Found>, here: &[TensorSpec], network: &Network) -> Self {
        let names = || there.keys().copied();
        match () {
            () if here.iter().any(|tensor| there.contains_key(tensor.name.as_str())) => Names::Own,
            () if torchvision::knows(names()) => Names::Torchvision(torchvision::parts(&network.layers, names())),
            () => Names::Unknown,
        }
    }

    fn are_known(&self) -> bool {
        !matches!(self, Names::Unknown)
    }

    /// What the tensor called `here` is called there.
    fn there(&self, here: &str) -> Option<String> {
        match self {
            Names::Own => Some(here.to_string()),
            Names::Torchvision(parts) => parts.iter().find_map(|part| {
                let rest = here.strip_prefix(&part.ours)?.strip_prefix('.')?;
                Some(format!("{}.{rest}", part.theirs))
            }),
            Names::Unknown => None,
        }
    }

    /// Whether a tensor called so there belongs to a batch norm in whose place the network has a group norm.
    fn is_of_group_norm(&self, there: &str) -> bool {
        let Names::Torchvision(parts) = self else { return false };
        let of = |part: &Part| there.strip_prefix(&part.theirs).is_some_and(|rest| rest.starts_with('.'));
        parts.iter().any(|part| part.norm == Some(NormKind::Group) && of(part))
    }

    /// Why the network cannot take its tensor from this one.
    fn refused(&self, name: &str, found: &Found, wanted: &TensorSpec) -> Option<Reason> {
        match found.dtype {
            _ if self.is_of_group_norm(name) => Some(Reason::Norm),
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 if found.shape == wanted.shape => None,
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                Some(Reason::Shape(found.shape.clone(), wanted.shape.clone()))
            }
            other => Some(Reason::Type(format!("{other:?}"))),
        }
    }
}

fn unknown(there: &BTreeMap<&str, Found>) -> String {
    let some: Vec<&str> = there.keys().copied().take(4).collect();
    format!(
        "its tensors ({}{}) are called neither as here (layers.0.conv2d.weight, …) nor as torchvision calls a ResNet's \
         (layer1.0.conv1.weight, …)",
        some.join(", "),
        if there.len() > some.len() { ", …" } else { "" }
    )
}

fn content(path: &Path) -> Result<Vec<u8>> {
    read(path).map_err(|e| Error::input(format!("train.init: {}: it cannot be read: {e}", path.display())))
}

fn parsed<'a>(path: &Path, content: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(content).map_err(|e| {
        Error::input(format!(
            "train.init: {}: it is no safetensors file ({e}); PyTorch writes one by \
             safetensors.torch.save_file(model.state_dict(), \"model.safetensors\")",
            path.display()
        ))
    })
}
