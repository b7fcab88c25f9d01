//! A host for incoming simulated VMs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Gfn;
use crate::identity::MigrationId;
use crate::snapshot::Blob;
use crate::vm::{DestinationHost, DestinationVm, Offer};

use super::{Operation, RunGuard, SimulatedVm};

/// Makes a simulated VM of whatever layout is offered.
#[derive(Default)]
pub struct SimulatedHost {
    guard: Option<Arc<RunGuard>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    vm: Option<Arc<SimulatedVm>>,
    offer: Option<Offer>,
    blobs: Vec<Blob>,
    check: Vec<String>,
    prepare: Vec<String>,
    failures: Vec<(Operation, usize)>,
    load_page: Option<Gfn>,
}

impl SimulatedHost {
    /// A host whose VMs `guard` watches.
    pub fn new(guard: &Arc<RunGuard>) -> Self {
        Self { guard: Some(Arc::clone(guard)), ..Self::default() }
    }

    /// The offer is refused for these reasons; no reason lets it pass.
    pub fn refuse(&self, reasons: &[&str]) {
        self.state().check = reasons.iter().map(|reason| (*reason).to_owned()).collect();
    }

    /// Making the VM fails for these reasons.
    pub fn refuse_to_prepare(&self, reasons: &[&str]) {
        self.state().prepare = reasons.iter().map(|reason| (*reason).to_owned()).collect();
    }

    /// VMs made from now on fail so often.
    pub fn fail(&self, operation: Operation, times: usize) {
        self.state().failures.push((operation, times));
    }

    /// Loading the state of VMs made from now on reads this page.
    pub fn set_load_page(&self, gfn: Gfn) {
        self.state().load_page = Some(gfn);
    }

    /// The VM that was made last, unless it was discarded.
    pub fn vm(&self) -> Option<Arc<SimulatedVm>> {
        self.state().vm.clone()
    }

    /// The offer that came last.
    pub fn offer(&self) -> Option<Offer> {
        self.state().offer.clone()
    }

    /// The blobs that came last.
    pub fn blobs(&self) -> Vec<Blob> {
        self.state().blobs.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DestinationHost for SimulatedHost {
    fn check(&self, offer: &Offer) -> Vec<String> {
        let mut state = self.state();
        state.offer = Some(offer.clone());
        state.check.clone()
    }

    fn prepare(
        &self,
        offer: &Offer,
        blobs: Vec<Blob>,
    ) -> Result<Arc<dyn DestinationVm>, Vec<String>> {
        let mut state = self.state();
        state.blobs = blobs;
        if !state.prepare.is_empty() {
            return Err(state.prepare.clone());
        }
        let vm = SimulatedVm::new(offer.layout.clone()).map_err(|error| vec![error.to_string()])?;
        let vm = Arc::new(vm.incoming());
        if let Some(guard) = &self.guard {
            vm.watch(guard);
        }
        for (operation, times) in &state.failures {
            vm.fail(*operation, *times);
        }
        if let Some(gfn) = state.load_page {
            vm.set_load_page(gfn);
        }
        state.vm = Some(Arc::clone(&vm));
        Ok(vm)
    }

    fn discarded(&self, _id: MigrationId) {
        self.state().vm = None;
    }
}
