//! What a finished run leaves: a PEFT adapter, GGUF files for llama.cpp, a report in numbers, words and pictures.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as Gguf};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::adapter::Adapter;
use super::base::read_config;
use super::checkpoint::{Checkpoint, Held, Look, State, state_of};
use super::gguf::{self, Precision, gguf_name, interleave};
use super::settings::Settings;
use super::{Config, TrainError, Weights, save};

/// A checkpoint with what it trained.
pub struct Finished {
    /// The base model's description.
    pub config: Config,
    /// How it was trained.
    pub settings: Settings,
    /// The numbers.
    pub adapter: Adapter,
    /// The checkpoint itself.
    pub checkpoint: Checkpoint,
}

impl Finished {
    /// Reads a checkpoint of a model in `base`. Of the base, only the description is read.
    pub fn read(base: &Path, bytes: &[u8]) -> Result<Self, TrainError> {
        let config = read_config(base)?;
        let settings = Settings::from_json(serde_json::from_str(&state_of(bytes)?.settings)?)?;
        let (rank, alpha) = (settings.lora_r, settings.lora_alpha);
        let mut adapter = Adapter::new(&config, &settings.modules(), rank, alpha, settings.seed)?;
        let checkpoint = Checkpoint::decode(bytes, &adapter)?;
        adapter.values.clone_from(&checkpoint.values);
        Ok(Self {
            config,
            settings,
            adapter,
            checkpoint,
        })
    }

    /// How far it got.
    pub fn state(&self) -> &State {
        &self.checkpoint.state
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT reads them. `base` is what the
    /// configuration calls the base model.
    pub fn write_peft(&self, folder: &Path, base: &str) -> Result<(), TrainError> {
        let (adapter, rank) = (&self.adapter, self.adapter.rank());
        let mut weights = Weights::new();
        for slot in adapter.slots() {
            let [a, b] = slot.peft_names();
            weights.insert(
                a,
                Tensor::from_slice(adapter.a(slot), (rank, slot.columns), &Device::Cpu)?,
            );
            weights.insert(
                b,
                Tensor::from_slice(adapter.b(slot), (slot.rows, rank), &Device::Cpu)?,
            );
        }
        save(&weights, &folder.join("adapter_model.safetensors"), DType::F32)?;
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": adapter.alpha(),
            "lora_dropout": self.settings.lora_dropout,
            "target_modules": self.settings.modules(),
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "inference_mode": true,
            "modules_to_save": null,
            "use_dora": false,
            "use_rslora": false,
        });
        let text = serde_json::to_string_pretty(&config)? + "\n";
        Ok(std::fs::write(folder.join("adapter_config.json"), text)?)
    }

    /// Writes the adapter alone as GGUF, for llama.cpp's `--lora`. `base` is the digest of the GGUF file that it goes
    /// over: others are refused then.
    pub fn write_gguf_adapter<W: Write + Seek>(
        &self,
        name: &str,
        base: Option<&str>,
        out: &mut W,
    ) -> Result<(), TrainError> {
        let (adapter, rank) = (&self.adapter, self.adapter.rank());
        let architecture = &self.config.model_type;
        let text = |value: &str| Gguf::String(value.to_owned());
        let mut metadata = vec![
            ("general.architecture", text(architecture)),
            ("general.type", text("adapter")),
            ("general.name", text(name)),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Gguf::F32(adapter.alpha() as f32)),
        ];
        metadata.extend(base.map(|base| (crate::inspect::BASE_KEY, text(base))));
        let mut tensors = Vec::new();
        for slot in adapter.slots() {
            let a = Tensor::from_slice(adapter.a(slot), (rank, slot.columns), &Device::Cpu)?;
            let b = Tensor::from_slice(adapter.b(slot), (slot.rows, rank), &Device::Cpu)?;
            let b = match gguf::turned_heads(&self.config, &slot.path()) {
                Some(heads) => interleave(&b, heads)?,
                None => b,
            };
            let name = gguf_name(&format!("{}.weight", slot.path()));
            tensors.push((format!("{name}.lora_a"), QTensor::quantize(&a, GgmlDType::F32)?));
            tensors.push((format!("{name}.lora_b"), QTensor::quantize(&b, GgmlDType::F32)?));
        }
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
            .collect();
        gguf_file::write(out, &metadata, &tensors)?;
        Ok(())
    }

    /// Writes base and adapter as one GGUF model.
    pub fn write_merged<W: Write + Seek>(
        &self,
        base: &Path,
        name: &str,
        out: &mut W,
    ) -> Result<(), TrainError> {
        let mut weights = Weights::new();
        for path in super::base::weight_files(base)? {
            weights.extend(super::load(&path, &Device::Cpu)?);
        }
        for slot in self.adapter.slots() {
            let name = format!("{}.weight", slot.path());
            let weight = weights
                .get_mut(&name)
                .ok_or_else(|| TrainError::Missing(name.clone()))?;
            let more = Tensor::from_vec(
                self.adapter.addition(slot),
                (slot.rows, slot.columns),
                &Device::Cpu,
            )?;
            *weight = (&*weight + more)?;
        }
        gguf::export_weights(base, &weights, name, Precision::F16, out)
    }

    /// Losses in numbers: what `report.json` holds.
    pub fn report(&self) -> Value {
        let state = self.state();
        let languages: BTreeMap<&String, Value> = self
            .compared()
            .into_iter()
            .map(|(tag, before, after)| {
                let one = |held: Held| json!({"loss": held.loss(), "bits_per_byte": held.bits_per_byte()});
                let (tokens, bytes) = (after.tokens, after.bytes);
                (
                    tag,
                    json!({"before": one(before), "after": one(after), "tokens": tokens, "bytes": bytes}),
                )
            })
            .collect();
        json!({
            "steps": state.step,
            "steps_planned": state.total,
            "tokens": state.tokens,
            "trainers": state.learners,
            "examples": state.examples.0,
            "examples_held_out": state.examples.1,
            "loss": self.checkpoint.losses,
            "held_out": languages,
            "looks": state.looks,
        })
    }

    /// The first and last look, language by language.
    fn compared(&self) -> Vec<(&String, Held, Held)> {
        let looks = &self.state().looks;
        // Before the end of a run there may be but one look: then nothing is known of after.
        let [first, .., last] = looks.as_slice() else {
            return Vec::new();
        };
        let after = |(tag, before): (_, &Held)| last.languages.get(tag).map(|after| (tag, *before, *after));
        first.languages.iter().filter_map(after).collect()
    }

    /// The held-out losses as a table in Markdown.
    pub fn table(&self) -> String {
        let mut out = "| language | tokens | loss before | loss after | bits per byte before | after |\n\
            |---|---:|---:|---:|---:|---:|\n"
            .to_owned();
        for (tag, before, after) in self.compared() {
            let _ = writeln!(
                out,
                "| {tag} | {} | {:.3} | {:.3} | {:.3} | {:.3} |",
                after.tokens,
                before.loss(),
                after.loss(),
                before.bits_per_byte(),
                after.bits_per_byte(),
            );
        }
        out
    }

    /// Training loss over steps, held-out loss over it, and bits per byte of every language before and after.
    pub fn plot(&self) -> String {
        plot(&self.checkpoint.losses, &self.state().looks, &self.compared())
    }

    /// A model card.
    pub fn card(&self, base: &str, name: &str) -> String {
        let state = self.state();
        let s = &self.settings;
        let languages: Vec<&str> = self
            .compared()
            .into_iter()
            .map(|(tag, ..)| tag.as_str())
            .collect();
        let listed: String = languages.iter().map(|tag| format!("- {tag}\n")).collect();
        let front = if listed.is_empty() {
            String::new()
        } else {
            format!("language:\n{listed}")
        };
        format!(
            "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\n{front}tags:\n- lora\n---\n\n\
             # {name}\n\nA low-rank adapter (rank {}, alpha {}, on {}) for {base}, trained with Karez on {} examples in \
             {} steps ({} tokens), {} examples held out.\n\n## Held-out losses\n\nCross-entropy of the answers in nats per \
             token, and in bits per byte of their text. Lower is better.\n\n{}\n![Losses](losses.svg)\n\n\
             ## Settings\n\n```json\n{}\n```\n\n## Origin\n\n`manifest.json` names base, data, settings and the machines \
             that took part by their digests and keys; `manifest.sig` signs it. Computed by {}.\n\n| | BLAKE3 |\n|---|---|\n| base model \
             | `{}` |\n| data | `{}` |\n",
            s.lora_r,
            s.lora_alpha,
            s.modules().join(", "),
            state.examples.0,
            state.step,
            state.tokens,
            state.examples.1,
            self.table(),
            serde_json::to_string_pretty(s).unwrap_or_default(),
            state.learners.join(", then "),
            state.base,
            state.data,
        )
    }

    /// Writes everything into `folder`: adapter, GGUF, card, report and plot. Says what could not be made and why.
    pub fn write_all(
        &self,
        folder: &Path,
        base: &Path,
        base_name: &str,
        name: &str,
    ) -> Result<Vec<String>, TrainError> {
        let mut remarks = Vec::new();
        self.write_peft(folder, base_name)?;
        let over = match gguf::base_digest(base) {
            Ok(digest) => Some(digest),
            // Said below, where a whole model would be made.
            Err(TrainError::Unsupported(_)) => None,
            Err(error) => return Err(error),
        };
        let mut out = BufWriter::new(File::create(folder.join("adapter.gguf"))?);
        self.write_gguf_adapter(name, over.as_deref(), &mut out)?;
        out.flush()?;
        let merged = folder.join("model.gguf");
        let mut out = BufWriter::new(File::create(&merged)?);
        match self
            .write_merged(base, name, &mut out)
            .and_then(|()| Ok(out.flush()?))
        {
            Ok(()) => {}
            Err(TrainError::Unsupported(why)) => {
                std::fs::remove_file(&merged)?;
                remarks.push(format!(
                    "no model.gguf was made: {why}; adapter.gguf goes with the base's own GGUF file"
                ));
            }
            Err(error) => return Err(error),
        }
        std::fs::write(folder.join("README.md"), self.card(base_name, name))?;
        std::fs::write(
            folder.join("report.json"),
            serde_json::to_string_pretty(&self.report())? + "\n",
        )?;
        std::fs::write(folder.join("losses.svg"), self.plot())?;
        Ok(remarks)
    }
}

/// Size of the picture, and of its two halves.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 420.0;
const MARGIN: f64 = 44.0;

/// The nearest of 1, 2 and 5 times a power of ten that is not smaller.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-6).log10().floor());
    let times = [1.0, 2.0, 5.0].into_iter().find(|times| times * power >= least);
    times.unwrap_or(10.0) * power
}

fn plot(losses: &[f32], looks: &[Look], compared: &[(&String, Held, Held)]) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    let held: Vec<(f64, f64)> = looks.iter().map(|look| (look.step as f64, look.loss())).collect();
    let top = losses
        .iter()
        .map(|loss| f64::from(*loss))
        .chain(held.iter().map(|(_, loss)| *loss));
    let top = top.filter(|loss| loss.is_finite()).fold(0.1, f64::max) * 1.05;
    let steps = losses.len().max(1) as f64;
    let (bottom, span) = (HEIGHT - MARGIN, HEIGHT - 2.0 * MARGIN);
    let x = |step: f64| MARGIN + step / steps * (LEFT - MARGIN - 20.0);
    let y = |loss: f64| bottom - loss / top * span;
    let _ = writeln!(
        out,
        "<text x=\"{MARGIN}\" y=\"20\" font-size=\"13\">Loss (nats per token) over {} steps</text>",
        losses.len()
    );
    let apart = round_step(top / 5.0);
    for tick in 0..=(top / apart) as u32 {
        let loss = f64::from(tick) * apart;
        let _ = writeln!(
            out,
            "<line x1=\"{MARGIN}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/><text x=\"{2:.1}\" \
             y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            LEFT - 20.0,
            y(loss),
            MARGIN - 4.0,
            y(loss) + 4.0,
            // Without the digits that binary fractions leave.
            (loss * 1e6).round() / 1e6,
        );
    }
    let apart = round_step(steps / 5.0).max(1.0);
    for tick in 0..=(steps / apart) as u32 {
        let step = f64::from(tick) * apart;
        let (x, y) = (x(step), bottom + 14.0);
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{step}</text>"
        );
    }
    // At most a thousand points: a long run's curve is as wide as the picture.
    let every = losses.len().div_ceil(1000).max(1);
    let line: String = (0..losses.len())
        .step_by(every)
        .map(|step| format!("{:.1},{:.1} ", x(step as f64 + 1.0), y(f64::from(losses[step]))))
        .collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#2a6f97\"/>",
        line.trim_end()
    );
    let line: String = held
        .iter()
        .map(|(step, loss)| format!("{:.1},{:.1} ", x(*step), y(*loss)))
        .collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#c1121f\" stroke-width=\"2\"/>",
        line.trim_end()
    );
    let _ = writeln!(
        out,
        "<text x=\"{MARGIN}\" y=\"{0:.1}\" fill=\"#2a6f97\">training</text><text x=\"{1:.1}\" y=\"{0:.1}\" \
         fill=\"#c1121f\">held out</text><text x=\"{2:.1}\" y=\"{0:.1}\" fill=\"#868e96\">before</text><text x=\"{3:.1}\" \
         y=\"{0:.1}\" fill=\"#2a6f97\">after</text>",
        HEIGHT - 8.0,
        MARGIN + 60.0,
        LEFT + 50.0,
        LEFT + 104.0,
    );
    for (step, loss) in &held {
        let (x, y) = (x(*step), y(*loss));
        let _ = writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"#c1121f\"/>"
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"20\" font-size=\"13\">Held out, bits per byte: before and after</text>"
    );
    let shown = &compared[..compared.len().min(12)];
    let most = shown
        .iter()
        .map(|(_, before, after)| before.bits_per_byte().max(after.bits_per_byte()));
    let most = most.filter(|bits| bits.is_finite()).fold(0.01, f64::max);
    let row = span / shown.len().max(1) as f64;
    let wide = WIDTH - LEFT - 130.0;
    for (index, (tag, before, after)) in shown.iter().enumerate() {
        let at = MARGIN + row * index as f64;
        let bar = (row / 2.0 - 2.0).clamp(2.0, 14.0);
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tag}</text>",
            LEFT + 44.0,
            at + bar + 2.0
        );
        for (offset, held, colour) in [(0.0, before, "#adb5bd"), (bar + 1.0, after, "#2a6f97")] {
            let bits = held.bits_per_byte();
            let length = bits / most * wide;
            let _ = writeln!(
                out,
                "<rect x=\"{0:.1}\" y=\"{1:.1}\" width=\"{length:.1}\" height=\"{bar:.1}\" fill=\"{colour}\"/><text \
                 x=\"{2:.1}\" y=\"{3:.1}\">{bits:.2}</text>",
                LEFT + 50.0,
                at + offset,
                LEFT + 54.0 + length,
                at + offset + bar - 1.0,
            );
        }
    }
    out.push_str("</svg>\n");
    out
}
