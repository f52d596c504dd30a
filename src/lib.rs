//! Sideways and Skip-Sideways training of deep video networks: one module a rank, and nobody waits for the way back.
//!
//! A network is cut into D *modules*, one on each MPI rank (or thread). Frame t of a clip enters module 1 at tick t and takes one
//! tick from module to module. At every tick each module makes a forward pass (F) with the newest activation from below, and,
//! as soon as cotangents come back, a backward pass (B) with the newest one from above. With D = 3 and a clip of T = 5 frames:
//!
//! | tick      | 0    | 1  | 2      | 3      | 4      | 5     | 6     |
//! |-----------|------|----|--------|--------|--------|-------|-------|
//! | module 1  | F0   | F1 | F2     | F3     | F4 B4  |       |       |
//! | module 2  |      | F0 | F1     | F2 B2  | F3 B3  | F4 B4 |       |
//! | module 3  |      |    | F0 B0  | F1 B1  | F2 B2  | F3 B3 | F4 B4 |
//!
//! `F2` is the forward pass of the module's *step* 2, its work on frame 2. `B2` of module 2 is a vector–Jacobian product at that
//! step's activations, of the cotangent that module 3 made one tick before for its own step 0: the two come from different frames
//! (Sideways, Malinowski et al., CVPR 2020). Skip connections take one tick too, whatever they span, and so bring *newer* frames
//! (Skip-Sideways, CVPR 2021, arXiv 2106.08318). The exact rules (`rule = "1f1b"`, `"gpipe"`, `"bp"`) are other such tables,
//! followed by the same loop.
//!
//! # Where to begin reading
//! 1. [`method`]: the graph of modules, and [`method::schedule`], which makes such a table of (graph, T, rule).
//! 2. `pipeline::tick`: the loop that follows it, one page; [`pipeline`] has what it works on.
//! 3. [`backend::stage`]: a [`Stage`](backend::stage::Stage) computes one module, on the CPU or a GPU.
//! 4. [`comm`]: a link carries messages between two modules, within a process, over MPI, or from GPU to GPU.
//! 5. [`trainer`]: a run from its start to its end; [`cli`] is a thin layer on it.
//!
//! Below these: [`nn`] (layers, losses, optimisers), [`network`] (what is cut where), [`data`] (shards and clips), [`config`],
//! [`setup`] (a run, planned), [`checkpoint`], [`torch`] (to and from PyTorch), [`metrics`], [`tensorboard`], [`plan`] (cuts by
//! measured times, predictions), [`study`] (scaling studies), [`report`], [`sys`]. Words have one meaning each: see `docs/GLOSSARY.md`.
//!
//! # Training in a program of one's own
//! Alone, this is the whole of it; under `mpirun` every rank does the same with [`comm::World::join`].
//! ```
//! use sideways::comm::World;
//! use sideways::config::Config;
//! use sideways::data::{Encoding, ShardHeader, ShardWriter};
//! use sideways::trainer::Trainer;
//!
//! # fn main() -> sideways::Result<()> {
//! // A shard of four videos of ten frames, 8 x 8 pixels, each of one grey.
//! let folder = tempfile::tempdir().expect("a temporary folder");
//! let header = ShardHeader {
//!     encoding: Encoding::Raw,
//!     fps: 25.0,
//!     height: 8,
//!     width: 8,
//!     dataset: "greys".into(),
//!     split: "train".into(),
//!     class_names: vec!["dark".into(), "light".into()],
//! };
//! let mut shard = ShardWriter::create(&folder.path().join("train.h5"), header)?;
//! for v in 0..4 {
//!     let frame = vec![60 + 45 * v as u8; 8 * 8 * 3];
//!     shard.append(&format!("video {v}"), i32::from(v > 1), std::iter::repeat_n(frame, 10))?;
//! }
//! shard.finish()?;
//!
//! // Two modules, trained on clips of eight frames, two at a time, for three batches.
//! let text = format!(
//!     r#"
//!     [data]
//!     train = "{0}/train.h5"
//!     frames = 8
//!     batch = 2
//!     [model]
//!     layers = [
//!         {{ kind = "conv2d", out = 4, kernel = 3 }}, {{ kind = "relu" }}, {{ kind = "global-avg-pool" }},
//!         {{ kind = "linear", out = 2 }},
//!     ]
//!     modules = 2
//!     [train]
//!     batches = 3
//!     [run]
//!     dir = "{0}/run"
//!     "#,
//!     folder.path().display()
//! );
//! let config = Config::parse(&text, "greys.toml", &[])?;
//! let world = World::Alone;
//! let trainer = Trainer::new(&world, &config, None)?;
//! let totals = trainer.run(&mut |batch| println!("batch {}: loss {:.3}", batch.batches, batch.score.loss()))?;
//! trainer.conclude(&totals)?;
//!
//! assert_eq!(totals.batches, 3);
//! assert!(folder.path().join("run/checkpoints/step-00000003/manifest.json").exists());
//! # Ok(())
//! # }
//! ```

pub mod backend;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod config;
pub mod data;
pub mod error;
pub mod method;
pub mod metrics;
pub mod network;
pub mod nn;
pub mod pipeline;
pub mod plan;
pub mod report;
pub mod setup;
pub mod study;
pub mod sys;
pub mod tensorboard;
pub mod torch;
pub mod trainer;

pub use error::{Error, Result};
