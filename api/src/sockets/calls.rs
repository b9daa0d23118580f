//! Calls to agents: through the socket here, or through the API process that has it.

use std::sync::Arc;

use borealis_engine::{
    Result,
    devices::{
        calls::{Call, Outcome, Spec},
        sockets,
    },
    json::{self, Limits},
    work,
};
use borealis_protocol::calls::Answer;
use serde_json::{Value, value::RawValue};
use socketioxide::{AckError, SendError, SocketError};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{Hub, Running, registry::Agent};
use crate::metrics::METERS;

/// Calls to one device that are under way at once; further ones wait, within the time limit of the call.
pub const AT_ONCE: usize = 8;

/// Which sockets a call may go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// Those of every API process.
    Any,
    /// Those of this process: another one has passed the call on.
    Here,
}

impl Hub {
    /// Asks a device's agent, on whichever API process it is, and waits for its answer. A caller that stops waiting ends the call; what
    /// the agent was asked is not taken back.
    ///
    /// # Errors
    /// As [`Outcome::into_reply`]; 503 `busy` when too many large answers are being read; when the database is away.
    pub async fn call<C: Call>(&self, device: Uuid, request: &C::Request) -> Result<C::Reply> {
        let outcome = self.call_named(device, Spec::of::<C>(), &serde_json::to_value(request)?, Through::Any).await?;
        let Outcome::Answered { reply } = &outcome else { return outcome.into_reply::<C>() };
        let size = json::measure(reply.get().as_bytes(), Limits::values(C::ANSWER_VALUES))?;
        let _held = match self.running() {
            Some(running) => Some(running.answers.take(&device.to_string(), size.tree_bytes()).await?),
            None => None,
        };
        work::sized(reply.get().len(), move || outcome.into_reply::<C>()).await?
    }

    /// As [`Hub::call`], for callers that have the call by its name.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn call_named(&self, device: Uuid, spec: Spec, request: &Value, through: Through) -> Result<Outcome> {
        let Some(running) = self.running() else { return Ok(Outcome::Away) };
        let started = Instant::now();
        let outcome = running.call(device, spec, request, through).await?;
        if through == Through::Any {
            METERS.agent_call(spec.name, outcome.word(), started.elapsed());
        }
        Ok(outcome)
    }
}

impl Running {
    async fn call(&self, device: Uuid, spec: Spec, request: &Value, through: Through) -> Result<Outcome> {
        let deadline = Instant::now() + spec.limit;
        if let Some(agent) = self.registry.agent_of(device) {
            return Ok(call_here(&agent, spec, request, deadline).await);
        }
        if through == Through::Here {
            return Ok(Outcome::Away);
        }
        // Once: a device that is moving from one process to another may have been asked before it was lost.
        match sockets::owner(&self.pool, device).await? {
            Some(owner) if owner.process != self.process_id => {
                Ok(self.peers.call(&owner.internal_url, device, spec, request, deadline).await)
            }
            _ => Ok(Outcome::Away),
        }
    }
}

async fn call_here(agent: &Arc<Agent>, spec: Spec, request: &Value, deadline: Instant) -> Outcome {
    let Some(socket) = agent.socket() else { return Outcome::Away };
    let turn = tokio::select! {
        turn = timeout_at(deadline, agent.calls.acquire()) => turn,
        () = agent.cut.cancelled() => return Outcome::Away,
    };
    let Ok(Ok(_turn)) = turn else { return Outcome::Busy };
    let left = deadline.saturating_duration_since(Instant::now());
    agent.heard.ask();
    let answer = match socket.timeout(left).emit_with_ack::<_, Box<RawValue>>(spec.event, request) {
        Ok(answer) => answer,
        Err(SendError::Socket(SocketError::InternalChannelFull)) => return Outcome::Busy,
        Err(_) => return Outcome::Away,
    };
    let answer = tokio::select! {
        answer = answer => answer,
        () = agent.cut.cancelled() => return Outcome::Away,
    };
    match answer {
        Ok(arguments) => read(spec, arguments).await,
        Err(AckError::Timeout) => Outcome::TimedOut,
        Err(AckError::Socket(_)) => Outcome::Away,
        Err(AckError::Decode(_)) => Outcome::Unreadable,
    }
}

/// Reads what an agent answered: the JSON text of its arguments. No tree is built of one that is larger than the call allows.
async fn read(spec: Spec, arguments: Box<RawValue>) -> Outcome {
    if arguments.get().len() > spec.answer_bytes {
        return Outcome::Unreadable;
    }
    let length = arguments.get().len();
    let read = move || {
        if json::measure(arguments.get().as_bytes(), Limits::values(spec.answer_values)).is_err() {
            return Outcome::Unreadable;
        }
        match Answer::read(arguments.get()) {
            Answer::Reply(reply) => match RawValue::from_string(reply.to_owned()) {
                Ok(reply) => Outcome::Answered { reply },
                Err(_) => Outcome::Unreadable,
            },
            Answer::Refused(refusal) => Outcome::refused(refusal),
            Answer::Unreadable => Outcome::Unreadable,
        }
    };
    // The pool is full: the answer is lost, as if it had come too late.
    work::sized(length, read).await.unwrap_or(Outcome::TimedOut)
}
