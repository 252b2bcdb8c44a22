//! The provider's daemon: probe, owner policy, run leases.
