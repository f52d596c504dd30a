//! Links whose values an MPI library moves between GPUs' memories, each with a companion that carries headers.

use std::collections::HashMap;

use crate::Result;
use crate::backend::cuda::shared::{Port, Ring};
use crate::comm::{LinkSpec, Outside};

/// The links between ranks, and this rank's ends of them.
#[derive(Default)]
pub struct Carried {
    /// By link, the one that carries its values.
    pub values: HashMap<u32, LinkSpec>,
    /// This rank's places for messages: of links it sends on or receives from.
    pub rings: HashMap<u32, Ring>,
}

impl Carried {
    /// Places for `links`, which go between ranks, numbering the links of values from `first` on.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if GPU memory does not suffice.
    pub fn open(port: &Port, placement: &[usize], here: usize, links: &[LinkSpec], first: u32) -> Result<Self> {
        let mut carried = Carried::default();
        for (id, link) in (first..).zip(links) {
            let name = format!("{}, values", link.name);
            carried.values.insert(link.id, LinkSpec { id, name, ..link.clone() });
            if [link.from, link.to].into_iter().any(|w| placement[w] == here) {
                carried.rings.insert(link.id, Ring::allocate(port, 4 * link.words, link.depth)?);
            }
        }
        Ok(carried)
    }

    /// This rank's places of the links of values, by their numbers; `number` changes those.
    pub fn outside(&self, number: impl Fn(&LinkSpec) -> u32) -> HashMap<u32, Vec<Outside>> {
        let mut all = HashMap::new();
        for (id, ring) in &self.rings {
            if let Some(values) = self.values.get(id) {
                let place = |n| Outside { address: ring.place(n), part_of: ring.memory.clone() };
                all.insert(number(values), (0..ring.places).map(place).collect());
            }
        }
        all
    }
}
