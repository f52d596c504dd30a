//! A worker's ends of the links, as it takes them when a run starts.

#[cfg(feature = "cuda")]
use std::collections::HashMap;

#[cfg(feature = "cuda")]
use crate::comm::Values;
use crate::comm::all_reduce::ReplicaAverage;
use crate::comm::exchange::Exchange;
use crate::comm::{Endpoints, Receiver, Sender};
use crate::setup::Setup;
use crate::{Error, Result};

/// An edge's ends at one worker: its activations' and, where any is used, its cotangents'.
type EdgeEnds<Forward, Back> = (u32, Forward, Option<(u32, Back)>);

/// A worker's ends of links.
pub(crate) struct Ends {
    pub inputs: Vec<EdgeEnds<Receiver, Sender>>,
    pub outputs: Vec<EdgeEnds<Sender, Receiver>>,
    pub truth_in: Option<(u32, Receiver)>,
    pub truth_out: Option<(u32, Sender)>,
    pub console: (u32, Sender),
    pub average: Option<ReplicaAverage>,
    pub told: Option<(u32, Receiver)>,
    pub tells: Vec<(u32, Sender)>,
    /// By link, what moves its values past it.
    #[cfg(feature = "cuda")]
    pub values: HashMap<u32, Values>,
}

/// An end that belongs here.
pub(crate) fn take<T>(end: Option<T>, id: u32) -> Result<T> {
    end.ok_or_else(|| Error::Transport(format!("link {id} does not end here")))
}

/// Takes worker `w`'s ends.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only values of GPUs travel past the links"))]
pub(crate) fn ends_of(setup: &Setup, w: usize, endpoints: &mut Endpoints, exchange: &Exchange) -> Result<Ends> {
    let (i, r) = setup.grid.module_and_replica(w);
    let wiring = &setup.wiring;
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    for (k, spec) in setup.network.edges.iter().enumerate() {
        let (forward, backward) = (wiring.activations[r][k], wiring.cotangents[r][k]);
        if spec.edge.to == i {
            let back = backward.map(|id| Ok::<_, Error>((id, take(endpoints.sender(id), id)?))).transpose()?;
            inputs.push((forward, take(endpoints.receiver(forward), forward)?, back));
        }
        if spec.edge.from == i {
            let back = backward.map(|id| Ok::<_, Error>((id, take(endpoints.receiver(id), id)?))).transpose()?;
            outputs.push((spec.edge.span(), forward, take(endpoints.sender(forward), forward)?, back));
        }
    }
    outputs.sort_by_key(|(span, ..)| *span);
    let outputs = outputs.into_iter().map(|(_, id, sender, back)| (id, sender, back)).collect();
    let (mut truth_in, mut truth_out) = (None, None);
    if let Some(id) = wiring.truth[r] {
        if i == 1 {
            truth_out = Some((id, take(endpoints.sender(id), id)?));
        }
        if i == setup.grid.modules {
            truth_in = Some((id, take(endpoints.receiver(id), id)?));
        }
    }
    let id = wiring.reports[w];
    let console = (id, take(endpoints.sender(id), id)?);
    let average = wiring.average[i - 1]
        .map(|first| ReplicaAverage::new(endpoints, &average_links(setup, i, first), r))
        .transpose()?;
    let (mut told, mut tells) = (None, Vec::new());
    if i == 1 {
        if let Some(id) = wiring.control[r] {
            told = Some((id, take(endpoints.receiver(id), id)?));
        }
        for &id in wiring.control.iter().flatten().filter(|_| r == 0) {
            tells.push((id, take(endpoints.sender(id), id)?));
        }
    }
    Ok(Ends {
        #[cfg(feature = "cuda")]
        values: (setup.wiring.links.iter().filter(|l| l.from == w || l.to == w))
            .filter_map(|l| Some((l.id, exchange.values(l.id, endpoints)?)))
            .collect(),
        inputs,
        outputs,
        truth_in,
        truth_out,
        console,
        average,
        told,
        tells,
    })
}

fn average_links(setup: &Setup, i: usize, first: u32) -> Vec<crate::comm::LinkSpec> {
    let workers: Vec<usize> = (0..setup.grid.replicas).map(|r| setup.grid.worker(i, r)).collect();
    let words = setup.network.modules[i - 1].params as usize;
    ReplicaAverage::links(first, &format!("module {i}"), &workers, words)
}
