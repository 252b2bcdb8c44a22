//! An answer held against another institution's: the same question with the same seed, asked again elsewhere.
//!
//! Who answers does not know that it is compared, and who is compared with is another owner. Equal answers say that the first
//! one is the model's own; different ones may be honest: another processor rounds otherwise, and one rounding can turn a word.
use super::{
    ask::{Verification, Wishes},
    error::ApiError,
    work::{End, Question, Writing, whereabouts},
};
use crate::mind::Shared;
use karez_core::{controller::JobView, id::Institution, unit::Credits};
use serde_json::{Value, json};
use std::{pin::Pin, sync::Arc};

/// Asks again, and says what came of it. The answer at hand stands, whatever that is.
pub(super) fn again<'a>(
    shared: &'a Arc<Shared>,
    question: &'a Question,
    text: &'a str,
    view: &'a JobView,
) -> Pin<Box<dyn Future<Output = Value> + Send + 'a>> {
    // Boxed: what reads this answer is what reads the first one, and waits for this.
    Box::pin(async move {
        match whole(shared, question, view).await {
            Ok(second) => {
                let mut told = whereabouts(&second.view);
                told["level"] = "repeat".into();
                told["agrees"] = (second.text == text).into();
                told["agreed_characters"] = common(text, &second.text).into();
                told
            }
            Err(error) => {
                json!({"level": "repeat", "agrees": null, "reason": error.json()["error"]["message"]})
            }
        }
    })
}

async fn whole(shared: &Arc<Shared>, question: &Question, view: &JobView) -> Result<End, ApiError> {
    let question = Question {
        wishes: elsewhere(shared, question, view).await?,
        label: "verification",
        ..question.clone()
    };
    Writing::begin(shared, question).await?.whole().await
}

/// The same wishes, but for who answered; what that cost is spent.
async fn elsewhere(shared: &Shared, question: &Question, view: &JobView) -> Result<Wishes, ApiError> {
    let first = view.parts.iter().find_map(|part| part.institution.clone());
    let first = first.ok_or_else(|| ApiError::server("it is not known who answered"))?;
    let left = Credits(view.order.credits_max.0.saturating_sub(view.spent.0));
    let budget = question.caller.budget(shared).await;
    without(&question.wishes, &first, left.min(budget))
}

fn without(wishes: &Wishes, first: &Institution, left: Credits) -> Result<Wishes, ApiError> {
    let mut wishes = wishes.clone();
    let others = |names: &[Institution]| -> Vec<Institution> {
        names.iter().filter(|name| *name != first).cloned().collect()
    };
    let demanded = !wishes.constraints.institutions.is_empty();
    wishes.constraints.institutions = others(&wishes.constraints.institutions);
    if demanded && wishes.constraints.institutions.is_empty() {
        return Err(ApiError::request(format!(
            "karez.institutions names {first} alone, which answered: name two at least"
        )));
    }
    if !demanded && !wishes.constraints.institutions_excluded.contains(first) {
        wishes.constraints.institutions_excluded.push(first.clone());
    }
    wishes.prefer = others(&wishes.prefer);
    wishes.cost_max = Some(left);
    wishes.verification = Verification::None;
    Ok(wishes)
}

/// Characters that both begin with.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::records::Constraints;

    fn names(list: &[&str]) -> Vec<Institution> {
        list.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn whoever_answered_is_not_asked_again() {
        let wishes = |institutions: &[&str], avoid: &[&str]| Wishes {
            constraints: Constraints {
                institutions: names(institutions),
                institutions_excluded: names(avoid),
                ..Constraints::default()
            },
            prefer: names(&["hill", "lake"]),
            verification: Verification::Repeat,
            ..Wishes::default()
        };
        let first: Institution = "hill".parse().unwrap();
        let left = Credits(7);
        let again = without(&wishes(&[], &["coast"]), &first, left).unwrap();
        assert_eq!(again.constraints.institutions_excluded, names(&["coast", "hill"]));
        assert_eq!((again.prefer, again.cost_max), (names(&["lake"]), Some(left)));
        assert_eq!(again.verification, Verification::None);
        let again = without(&wishes(&["hill", "lake"], &[]), &first, left).unwrap();
        assert_eq!(again.constraints.institutions, names(&["lake"]));
        assert!(again.constraints.institutions_excluded.is_empty());
        let error = without(&wishes(&["hill"], &[]), &first, left).unwrap_err();
        assert!(
            error.json()["error"]["message"]
                .as_str()
                .unwrap()
                .contains("hill alone")
        );
    }

    #[test]
    fn answers_agree_up_to_a_character() {
        assert_eq!(common("maji safi", "maji mengi"), 5);
        assert_eq!(common("水を", "水が"), 1);
    }
}
