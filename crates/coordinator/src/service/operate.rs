//! An operator's stream: who gives an order proves first that they know the cluster's secret.

use auth::Nonce;
use cluster::proof::nonce;
use cluster::proto::operator_message::Message as Up;
use cluster::proto::operator_reply::Message as Down;
use cluster::proto::{Challenge, OperatorHello, OperatorMessage, OperatorReply, ProvenOrder};
use cluster::{Order, Session};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::{ClusterService, HANDSHAKE_TIMEOUT, check_protocol, invalid, stopped, unexpected};
use crate::command::Command;

/// What an Operate stream carries down: a challenge and what came of the order.
pub(crate) type OperatorSender = mpsc::Sender<Result<OperatorReply, Status>>;
pub(super) const REPLIES: usize = 2;

impl ClusterService {
    /// An Operate stream from its first message to its end.
    pub(super) async fn serve_operator(self, mut up: Streaming<OperatorMessage>, down: OperatorSender) {
        let order = match timeout(HANDSHAKE_TIMEOUT, self.order(&mut up, &down)).await {
            Ok(order) => order,
            Err(_) => Err(Status::deadline_exceeded("the order took too long")),
        };
        let done = match order {
            Ok(order) => self.carry_out(order).await,
            Err(status) => Err(status),
        };
        // Whoever asked may be gone.
        let _ = down.send(done.map(|done| OperatorReply { message: Some(done) })).await;
    }

    /// The order of somebody who knows the secret.
    async fn order(
        &self,
        up: &mut Streaming<OperatorMessage>,
        down: &OperatorSender,
    ) -> Result<Order, Status> {
        let Up::Hello(OperatorHello { protocol, nonce: theirs }) = receive(up).await? else {
            return Err(unexpected("hello"));
        };
        check_protocol("operator", protocol)?;
        let theirs = nonce("hello.nonce", &theirs).map_err(invalid)?;
        let ours = Nonce::random();
        let session = Session::new(self.secret.clone(), theirs, ours);
        let challenge = Challenge { nonce: ours.0.to_vec().into(), proof: session.coordinator_proof() };
        let _ = down.send(Ok(OperatorReply { message: Some(Down::Challenge(challenge)) })).await;
        let Up::Order(ProvenOrder { order, proof }) = receive(up).await? else {
            return Err(unexpected("order"));
        };
        if !session.verify_order(&order, &proof) {
            return Err(Status::unauthenticated("whoever sent the order does not know the cluster's secret"));
        }
        Order::decode(&order).map_err(invalid)
    }

    async fn carry_out(&self, order: Order) -> Result<Down, Status> {
        if let Order::Doctor { disturb } = order {
            let examination = self.ask(|reply| Command::Examine { disturb, reply }).await?;
            return Ok(Down::Report(examination.run().await.into()));
        }
        let done = self.ask(|reply| Command::Operate { order, reply }).await;
        // Also where the order changed nothing: it may be given again because the registry did not answer the first time.
        let Err(reason) = self.put_down().await else { return done.map(Down::Done) };
        let told = |what: &str| {
            format!(
                "{what}; a coordinator that takes over may not know how things stand, so order it again: {reason}"
            )
        };
        match done {
            Ok(done) => Ok(Down::Done(told(&done))),
            Err(refused) => Err(Status::new(refused.code(), told(refused.message()))),
        }
    }

    /// Puts down all orders that stand, for whoever leads next.
    async fn put_down(&self) -> Result<(), String> {
        let Some(book) = &self.book else { return Ok(()) };
        let book = book.lock().await;
        let orders = self.ask(|reply| Command::StandingOrders { reply }).await;
        let orders = orders.map_err(|status| status.message().to_owned())?;
        book.write(&orders).await.map_err(|error| error.to_string())
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Command,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| stopped())?.map_err(Status::failed_precondition)
    }
}

/// The next message of an operator; its end is an error.
async fn receive(up: &mut Streaming<OperatorMessage>) -> Result<Up, Status> {
    let message = up.message().await?.ok_or_else(|| Status::cancelled("the Operate stream was closed"))?;
    message.message.ok_or_else(|| unexpected("a message"))
}
