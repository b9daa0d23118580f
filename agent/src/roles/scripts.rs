//! Jobs that the engine sends, and cancels of them.

use std::sync::Arc;

use borealis_protocol::events::{DECLINED_QUEUE_FULL, QUICK_JOB_CANCEL, QUICK_JOB_RUN, QuickJobCancel, QuickJobRun};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tracing::warn;

use super::Role;
use crate::scripts::{Shared, decline};
use crate::socket::Inbound;

/// Takes jobs over, in the order they came.
pub(crate) struct Jobs(pub(crate) Arc<Shared>);

/// Cancels them. A cancel may overtake its job, which then finds itself ended.
pub(crate) struct Cancels(pub(crate) Arc<Shared>);

impl Role for Jobs {
    fn events(&self) -> &'static [&'static str] {
        &[QUICK_JOB_RUN]
    }

    fn handle<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value> {
        async move {
            match QuickJobRun::deserialize(&event.argument) {
                Ok(run) => self.0.take(run, &event.session).await,
                Err(error) => {
                    warn!(%error, "a job that cannot be read");
                    json!({"error": "invalid_payload"})
                }
            }
        }
        .boxed()
    }

    /// The engine keeps the job, and offers it again.
    fn refuse<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value> {
        async move {
            match event.argument.get("job_id").and_then(Value::as_i64) {
                Some(job_id) => decline(job_id, DECLINED_QUEUE_FULL, &event.session).await,
                None => json!({"error": DECLINED_QUEUE_FULL}),
            }
        }
        .boxed()
    }
}

impl Role for Cancels {
    fn events(&self) -> &'static [&'static str] {
        &[QUICK_JOB_CANCEL]
    }

    fn handle<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value> {
        async move {
            match QuickJobCancel::deserialize(&event.argument) {
                Ok(cancel) => self.0.cancel(cancel).await,
                Err(_) => json!({"error": "invalid_payload"}),
            }
        }
        .boxed()
    }
}
