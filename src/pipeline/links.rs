//! A worker's ends of the links, as it takes them when a run starts, and rank 0's ends of the reports.

use crate::Error;
use crate::Result;
use crate::comm::all_reduce::AllReduce;
use crate::comm::exchange::Edge;
use crate::comm::{BatchId, Endpoints, Kind, LinkSpec, Receiver, Sender};
use crate::metrics::Report;
use crate::setup::Setup;

/// An edge's ends at one worker: its activations' and, where any is used, its cotangents'.
type EdgeEnds<Forward, Back> = (u32, Forward, Option<(u32, Back)>);

/// A worker's ends of links.
pub(super) struct WorkerLinks {
    pub inputs: Vec<EdgeEnds<Receiver, Sender>>,
    pub outputs: Vec<EdgeEnds<Sender, Receiver>>,
    pub truth_in: Option<(u32, Receiver)>,
    pub truth_out: Option<(u32, Sender)>,
    pub console: (u32, Sender),
    pub all_reduce: Option<AllReduce>,
    /// First modules: decisions come here, but to replica 0's, and are passed on there.
    pub decisions_in: Option<(u32, Receiver)>,
    pub decisions_out: Vec<(u32, Sender)>,
}

/// The two links of every edge of the network, for all replicas, and those between replicas: for GPUs, which settle together how
/// messages travel.
pub(super) fn edges(setup: &Setup) -> (Vec<Edge>, Vec<LinkSpec>) {
    let (wiring, edges) = (&setup.wiring, setup.network.edges.len());
    let all = || (0..setup.grid.replicas).flat_map(|r| (0..edges).map(move |k| (r, k)));
    let edge = |(r, k)| Edge { there: wiring.activations(r, k), back: wiring.cotangents(r, k) };
    let (mut pairs, mut links): (Vec<Edge>, Vec<LinkSpec>) =
        (all().map(edge).collect(), all().flat_map(|(r, k)| wiring.of_edge(r, k)).collect());
    for i in 1..=setup.grid.modules {
        wiring.averaging(i, |group| {
            for (there, back) in (0..setup.grid.replicas).flat_map(|r| group.pairs(r)) {
                pairs.push(Edge { there: there.id, back: back.as_ref().map(|back| back.id) });
                links.extend([Some(there), back].into_iter().flatten());
            }
        });
    }
    (pairs, links)
}

impl WorkerLinks {
    /// Takes worker `w`'s.
    pub(super) fn take(setup: &Setup, w: usize, ends: &mut Endpoints) -> Result<Self> {
        let (i, r) = setup.grid.module_and_replica(w);
        let wiring = &setup.wiring;
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for (k, spec) in setup.network.edges.iter().enumerate() {
            let (forward, back) = (wiring.activations(r, k), wiring.cotangents(r, k));
            if spec.edge.to == i {
                let back = back.map(|id| Ok::<_, Error>((id, ends.sender(id)?))).transpose()?;
                inputs.push((forward, ends.receiver(forward)?, back));
            }
            if spec.edge.from == i {
                let back = back.map(|id| Ok::<_, Error>((id, ends.receiver(id)?))).transpose()?;
                outputs.push((spec.edge.span(), (forward, ends.sender(forward)?, back)));
            }
        }
        outputs.sort_by_key(|(span, _)| *span);
        let (first, last) = (i == 1, i == setup.grid.modules);
        let truth = wiring.truth(r);
        let told = wiring.told_by(r).filter(|_| first).filter_map(|r| wiring.decisions(r));
        Ok(WorkerLinks {
            inputs,
            outputs: outputs.into_iter().map(|(_, ends)| ends).collect(),
            truth_out: truth.filter(|_| first).map(|id| Ok::<_, Error>((id, ends.sender(id)?))).transpose()?,
            truth_in: truth.filter(|_| last).map(|id| Ok::<_, Error>((id, ends.receiver(id)?))).transpose()?,
            console: (wiring.reports(w), ends.sender(wiring.reports(w))?),
            all_reduce: wiring.averaging(i, |group| AllReduce::new(ends, group, r)).transpose()?,
            decisions_in: wiring
                .decisions(r)
                .filter(|_| first)
                .map(|id| Ok::<_, Error>((id, ends.receiver(id)?)))
                .transpose()?,
            decisions_out: told.map(|id| Ok((id, ends.sender(id)?))).collect::<Result<_>>()?,
        })
    }
}

/// Rank 0's ends of all workers' reports.
pub struct Reports(Vec<Receiver>);

impl Reports {
    /// Takes them.
    pub(super) fn take(setup: &Setup, ends: &mut Endpoints) -> Result<Self> {
        (0..setup.grid.workers()).map(|w| ends.receiver(setup.wiring.reports(w))).collect::<Result<_>>().map(Reports)
    }

    /// One report of every worker, in their order, of `batch`.
    ///
    /// # Errors
    /// [`Error::Transport`] if a worker is gone or reports another batch.
    pub fn gather(&mut self, batch: impl Into<BatchId>) -> Result<Vec<Report>> {
        let batch = batch.into();
        let mut reports = Vec::with_capacity(self.0.len());
        for receiver in &mut self.0 {
            let (header, payload) = receiver.wait_any()?;
            if header.kind != Kind::Report || header.batch != batch {
                return Err(Error::Transport(format!("{header} came where the report of {batch} was due")));
            }
            reports.push(Report::read(&payload[..header.words as usize])?);
            receiver.release()?;
        }
        Ok(reports)
    }
}
