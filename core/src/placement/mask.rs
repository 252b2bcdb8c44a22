//! What excludes a whole node before any of its devices is judged: places, owners, data, licences, isolation.
//!
//! Masks exclude, they never weigh. The node judges the same by itself (`agent`); here it only saves asking in vain.
use super::{Hint, Policy, Request, Requirement};
use crate::{
    id::{Country, Institution},
    prelude::*,
    records::{Constraints, Offer, OwnerPolicy, Tier, WorkKind},
};

/// All of a node that masks look at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Face<'a> {
    pub(super) country: &'a Country,
    pub(super) institution: &'a Institution,
    pub(super) terms: &'a OwnerPolicy,
    pub(super) tier: Tier,
}

impl<'a> Face<'a> {
    pub(super) fn of(offer: &'a Offer) -> Self {
        Self {
            country: &offer.country,
            institution: &offer.institution,
            terms: &offer.terms,
            tier: Tier::of_offer(&offer.isolation),
        }
    }
}

/// The country is allowed and not excluded.
fn in_country(c: &Constraints, country: &Country) -> bool {
    (c.countries.is_empty() || c.countries.contains(country)) && !c.countries_excluded.contains(country)
}

/// The institution is allowed and not excluded.
fn of_institution(c: &Constraints, name: &Institution) -> bool {
    (c.institutions.is_empty() || c.institutions.contains(name)) && !c.institutions_excluded.contains(name)
}

/// The first mask that the node fails.
pub(super) fn fails(face: Face<'_>, request: &Request<'_>, policy: &Policy) -> Option<Requirement> {
    let (c, terms) = (request.constraints, face.terms);
    if !in_country(c, face.country) {
        Some(Requirement::Country)
    } else if !of_institution(c, face.institution) {
        Some(Requirement::Institution)
    } else if !policy.energy.allows(face.country) {
        Some(Requirement::Carbon)
    } else if request.user.is_some_and(|user| !terms.serves(user)) || !terms.does(request.kind) {
        Some(Requirement::Owner)
    } else if c.data > terms.data {
        Some(Requirement::Data)
    } else if !terms.licensed(&c.licence, request.kind != WorkKind::Noop) {
        Some(Requirement::Licence)
    } else if face.tier < c.isolation {
        Some(Requirement::Isolation)
    } else {
        None
    }
}

/// What the node has instead of what it was excluded for.
pub(super) fn hint(offer: &Offer, request: &Request<'_>, failed: Requirement) -> Hint {
    Hint::Name(match failed {
        Requirement::Country | Requirement::Carbon => offer.country.to_string(),
        Requirement::Institution => offer.institution.to_string(),
        Requirement::Owner if !offer.terms.does(request.kind) => {
            format!("{} does no {} work", offer.institution, request.kind.as_str())
        }
        Requirement::Owner => {
            let user = request.user.map_or("strangers", |user| user.as_str());
            format!("{} does not serve {user}", offer.institution)
        }
        Requirement::Data => offer.terms.data.to_string(),
        Requirement::Licence => offer
            .terms
            .licences
            .iter()
            .take(4)
            .cloned()
            .collect::<Vec<_>>()
            .join(", "),
        Requirement::Isolation => Tier::of_offer(&offer.isolation).to_string(),
        _ => return Hint::Nothing,
    })
}
