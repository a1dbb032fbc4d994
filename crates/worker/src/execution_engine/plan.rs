//! Which answers of a job are to be generated, and from where. Pure.

use engine::ContinuedText;
use protocol::infer::{DeliveredAnswer, FinishReason, InferRequest};

/// The answers of one job, by index: those to the first prompt, then those to the next.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// How many answers each prompt gets.
    each: u32,
    answers: Vec<Answer>,
}

#[derive(Debug, Clone, Default)]
struct Answer {
    delivered: Vec<u32>,
    text: Option<ContinuedText>,
    ended: Option<FinishReason>,
}

impl Plan {
    /// Plans the answers of a job, of which an earlier attempt may have delivered some.
    pub(super) fn of(request: &InferRequest) -> Self {
        let mut answers = vec![Answer::default(); request.input.answers() as usize];
        for known in request.delivered.iter().flat_map(|delivered| &delivered.answers) {
            let DeliveredAnswer { index, tokens, text, finish_reason } = known;
            if let Some(answer) = answers.get_mut(*index as usize) {
                let text = text.as_ref().map(|known| ContinuedText { text: known.text.clone(), tokens: known.tokens });
                *answer = Answer { delivered: tokens.clone(), text, ended: *finish_reason };
            }
        }
        Self { each: request.input.answers_each(), answers }
    }

    pub(super) fn count(&self) -> u32 {
        self.answers.len() as u32
    }

    /// Returns the index of an answer's prompt.
    pub(super) fn prompt_of(&self, index: u32) -> u32 {
        index / self.each
    }

    /// Returns the number of an answer among those to its prompt.
    pub(super) fn number_of(&self, index: u32) -> u32 {
        index % self.each
    }

    /// Returns the tokens of an answer that the caller has.
    pub(super) fn delivered(&self, index: u32) -> &[u32] {
        self.answers.get(index as usize).map_or(&[], |answer| &answer.delivered)
    }

    /// Returns the text of an answer that the caller has, if its tokens are not known.
    pub(super) fn text(&self, index: u32) -> Option<&ContinuedText> {
        self.answers.get(index as usize)?.text.as_ref()
    }

    /// Returns whether an answer is to be continued after its text.
    pub(super) fn has_text(&self) -> bool {
        self.answers.iter().any(|answer| answer.text.is_some())
    }

    /// Returns the first answer at or after `index` that is not complete.
    pub(super) fn next(&self, index: u32) -> Option<u32> {
        (index..self.count()).find(|index| self.answers[*index as usize].ended.is_none())
    }

    /// Returns the first incomplete answer to each prompt. It evaluates the prompt for the others.
    pub(super) fn firsts(&self) -> impl Iterator<Item = u32> {
        (0..self.count()).filter(|index| self.is_first(*index))
    }

    /// Returns whether an answer is the first incomplete one to its prompt.
    pub(super) fn is_first(&self, index: u32) -> bool {
        self.next(index - self.number_of(index)) == Some(index)
    }

    /// Returns how many answers are complete.
    pub(super) fn ended(&self) -> usize {
        self.answers.iter().filter(|answer| answer.ended.is_some()).count()
    }

    /// Returns the number of tokens of the complete answers.
    pub(super) fn ended_tokens(&self) -> u32 {
        let ended = self.answers.iter().filter(|answer| answer.ended.is_some());
        ended.map(|answer| answer.delivered.len() as u32).fold(0, u32::saturating_add)
    }

    /// Returns why the first answer ended, if it did.
    pub(super) fn reason(&self) -> Option<FinishReason> {
        self.answers.first()?.ended
    }
}

#[cfg(test)]
impl Plan {
    /// Plans so many answers to each of some prompts, of which nothing was delivered.
    pub(super) fn new(prompts: u32, each: u32) -> Self {
        Self { each, answers: vec![Answer::default(); (prompts * each) as usize] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_answers_are_left_out_and_another_evaluates_their_prompt() {
        let mut plan = Plan::new(2, 3);
        assert_eq!(plan.firsts().collect::<Vec<_>>(), [0, 3]);
        for index in [0, 1, 3, 4, 5] {
            plan.answers[index] = Answer { delivered: vec![7, 8], text: None, ended: Some(FinishReason::Length) };
        }
        assert_eq!(plan.firsts().collect::<Vec<_>>(), [2]);
        assert_eq!((plan.next(0), plan.next(2), plan.next(3)), (Some(2), Some(2), None));
        assert_eq!((plan.ended(), plan.ended_tokens(), plan.reason()), (5, 10, Some(FinishReason::Length)));
    }
}
