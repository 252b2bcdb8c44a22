//! Leases on a model of the provider's own server: the server does the work, one request at a time for each lease.
use super::{Failure, Feed, Item, Running, Tools, bad_input};
use crate::server::{Counts, Server};
use karez_engine::{
    EngineError,
    protocol::{self, Output},
};
use std::{collections::VecDeque, sync::Arc};

impl Running {
    pub(super) async fn served(&mut self, tools: &Tools) -> Result<(), Failure> {
        let gone = || Failure::Node("the provider's own server does not have this model now".into());
        let server = tools.server.clone().ok_or_else(gone)?;
        let model = self.job.order.work.model().ok_or_else(gone)?;
        let name = server.name_of(model).ok_or_else(gone)?;
        let mut feed = Feed {
            lines: self.lines(tools).await?,
            held: None,
            again: VecDeque::new(),
            more: true,
        };
        loop {
            let batch = self.next_batch(&mut feed.lines, &mut feed.held).await?;
            if batch.is_empty() {
                return Ok(());
            }
            match self.serve(&server, &name, &batch).await? {
                Ok((output, used)) => {
                    super::add(&mut self.meters, &used);
                    self.results_of(&batch, output, &used)?;
                }
                Err(error) => self.refused(&batch, error)?,
            }
            self.answered();
            self.progress();
        }
    }

    /// One batch, or that it was told to stop.
    async fn serve(
        &mut self,
        server: &Arc<Server>,
        model: &str,
        batch: &[Item],
    ) -> Result<Result<(Output, protocol::Meters), EngineError>, Failure> {
        let work = match self.work_of(batch) {
            Ok(work) => work,
            Err(error) => return Ok(Err(error)),
        };
        let mut stopped = self.stopped.clone();
        // The server's own silence is bounded, so saying that it is waited for is no lie.
        let waited_for = self.waited_for();
        let doing = async {
            match work {
                protocol::Work::Generate(request) => {
                    if request.adapter.is_some() {
                        return Err(bad_input(
                            "the model is a provider's own server's, and takes no adapters".into(),
                        ));
                    }
                    request.check()?;
                    let item = batch.first().map_or(0, |item| item.index);
                    let mut say = |piece: protocol::Piece| {
                        let tokens = piece.tokens.len() as u64;
                        self.stream(item, piece);
                        self.telling.flush();
                        self.live_tokens += tokens;
                        self.progress();
                    };
                    let answered = server
                        .generate(model, &request, server.silence(), &mut say)
                        .await?;
                    let output = Output::Text {
                        text: answered.text,
                        finish: answered.finish,
                        logprobs: answered.logprobs,
                    };
                    Ok((output, answered.counts))
                }
                protocol::Work::Embed { texts } => {
                    let (vectors, counts) = server.embed(model, texts, server.silence()).await?;
                    Ok((
                        Output::Vectors {
                            vectors,
                            truncated: 0,
                        },
                        counts,
                    ))
                }
                _ => Err(bad_input(
                    "a provider's own server writes texts and makes vectors, nothing else".into(),
                )),
            }
        };
        let done: Result<(Output, Counts), EngineError> = tokio::select! {
            done = super::alive(waited_for, doing) => done,
            // Dropping the request closes its connection, and servers then stop writing.
            () = stopped.said() => return Err(Failure::Stopped),
        };
        Ok(done.map(|(output, counts)| {
            self.meters.counted = self.meters.counted.max(counts.by);
            let used = protocol::Meters {
                tokens_in: counts.tokens_in,
                tokens_out: counts.tokens_out,
                tokens_cached: counts.tokens_cached,
                ..protocol::Meters::default()
            };
            (output, used)
        }))
    }
}
