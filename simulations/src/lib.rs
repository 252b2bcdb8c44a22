//! Seeded worlds that run the real agent and controller, with faults and checkers.
