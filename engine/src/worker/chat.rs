//! Writing a conversation down the way a model was trained to read it.
//!
//! Chat templates are Jinja programs that come with the model file, from strangers: they run with a fuel limit, see
//! nothing but the conversation, and their failure is the model's or the request's fault, never a crash.
use minijinja::{Environment, Error, ErrorKind, context};

use crate::error::EngineError;
use crate::json::Json;
use crate::protocol::{Message, Prompt};

/// Instructions a template may take. Known ones need some tens for each message.
const FUEL: u64 = 2_000_000;
const NAME: &str = "chat";

/// A model's chat template, compiled.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    pub(crate) fn new(source: String, bos: String, eos: String) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As the tools that templates are written with do it.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source)?;
        Ok(Self {
            environment,
            bos,
            eos,
        })
    }

    /// The text a model continues with its answer to `messages`.
    pub(super) fn render(&self, messages: &[Message], tools: &[Json]) -> Result<String, EngineError> {
        // Templates ask whether there are tools, and an empty list would count as some.
        self.write(messages, (!tools.is_empty()).then_some(tools), true)
    }

    /// `messages` as they stand, and where `open` what the assistant's next turn begins with.
    pub(crate) fn render_turns(&self, messages: &[Message], open: bool) -> Result<String, EngineError> {
        self.write(messages, None, open)
    }

    fn write(&self, messages: &[Message], tools: Option<&[Json]>, open: bool) -> Result<String, EngineError> {
        self.environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages,
                    tools,
                    add_generation_prompt => open,
                    bos_token => self.bos,
                    eos_token => self.eos,
                })
            })
            .map_err(|error| {
                EngineError::bad_input(format!(
                    "the model's chat template refuses this conversation: {error}"
                ))
            })
    }
}

/// The conversation in a prompt and the tools it may call; none in a raw one.
pub(super) fn messages(prompt: &Prompt) -> Option<(Vec<Message>, &[Json])> {
    match prompt {
        Prompt::Raw { .. } => None,
        Prompt::Chat { messages, tools } => Some((messages.clone(), tools)),
        Prompt::Text { text, system } => {
            let system = system.iter().map(|content| Message::new("system", content));
            Some((system.chain([Message::new("user", text)]).collect(), &[]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[(&str, &str)]) -> Result<String, EngineError> {
        let messages: Vec<Message> = messages
            .iter()
            .map(|(role, content)| Message::new(*role, *content))
            .collect();
        ChatTemplate::new(source.into(), "<s>".into(), "</s>".into())
            .unwrap()
            .render(&messages, &[])
    }

    #[test]
    fn the_common_dialects_render() {
        let chatml = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(
            render(chatml, &[("user", "hi")]).unwrap(),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
        let python = "{{ bos_token }}{% for m in messages %}\n{%- if loop.first and m.role == 'system' %}\n    \
                      {%- set note = m.content.strip() %}\n    {%- continue %}\n{%- endif %}\n[{{ m.content.strip() }}]\
                      {% endfor %}";
        assert_eq!(
            render(python, &[("system", " be brief "), ("user", " hi ")]).unwrap(),
            "<s>[hi]"
        );
    }

    #[test]
    fn a_template_can_refuse_and_cannot_run_for_ever() {
        let refusing = "{{ raise_exception('roles must alternate') }}";
        assert!(
            render(refusing, &[])
                .unwrap_err()
                .to_string()
                .contains("roles must alternate")
        );
        let endless =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a * b }}{% endfor %}{% endfor %}";
        assert!(render(endless, &[]).unwrap_err().to_string().contains("fuel"));
    }
}
