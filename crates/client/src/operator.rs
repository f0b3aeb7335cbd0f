//! Orders of an operator, who knows the cluster's secret, to the coordinator's port for workers.

use auth::{Nonce, Secret};
use cluster::proof::nonce;
use cluster::proto::cluster_client::ClusterClient;
use cluster::proto::operator_message::Message as Up;
use cluster::proto::operator_reply::Message as Down;
use cluster::proto::{DoctorReport, OperatorHello, OperatorMessage, OperatorReply, ProvenOrder};
use cluster::{Order, PROTOCOL, Session};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::Error;
use crate::servers::{authority, endpoint};

/// Messages of an order: hello and itself.
const MESSAGES: usize = 2;

/// Has the leader among the coordinators at `host:port[,host:port…]` carry out an order; returns what came of it, in words.
///
/// # Errors
/// [`Error::Refused`] with the coordinator's reason, [`Error::Secret`] where it has another secret, and [`Error::Unreachable`] where
/// there is none.
pub async fn operate(addresses: &str, secret: &Secret, order: &Order) -> Result<String, Error> {
    match give(addresses, secret, order).await? {
        Down::Done(done) => Ok(done),
        _ => Err(Error::Protocol("no answer to an order")),
    }
}

/// Has all workers examined, even if that `disturb`s groups that work. Takes up to ten seconds.
///
/// # Errors
/// As [`operate`].
pub async fn examine(addresses: &str, secret: &Secret, disturb: bool) -> Result<DoctorReport, Error> {
    match give(addresses, secret, &Order::Doctor { disturb }).await? {
        Down::Report(report) => Ok(report),
        _ => Err(Error::Protocol("no report of an examination")),
    }
}

async fn give(addresses: &str, secret: &Secret, order: &Order) -> Result<Down, Error> {
    let mut failure = None;
    for address in addresses.split(',') {
        match give_to(authority(address), secret, order).await {
            Err(error) if error.is_passing() => drop(failure.get_or_insert(error)),
            settled => return settled,
        }
    }
    Err(failure.unwrap_or_else(|| Error::Address(addresses.to_owned())))
}

async fn give_to(address: &str, secret: &Secret, order: &Order) -> Result<Down, Error> {
    let unreachable = |source| Error::Unreachable { address: address.to_owned(), source };
    let channel = endpoint(address)?.connect().await.map_err(unreachable)?;
    let failed = |status| Error::from_status(address, status);
    let (up, messages) = mpsc::channel(MESSAGES);
    let ours = Nonce::random();
    let hello = OperatorHello { protocol: PROTOCOL, nonce: ours.0.to_vec().into() };
    send(&up, Up::Hello(hello)).await;
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut down = ClusterClient::new(channel).operate(messages).await.map_err(failed)?.into_inner();
    let Some(Down::Challenge(challenge)) = receive(&mut down).await.map_err(failed)? else {
        return Err(Error::Protocol("no challenge"));
    };
    let theirs =
        nonce("challenge.nonce", &challenge.nonce).map_err(|_| Error::Protocol("a malformed challenge"))?;
    let session = Session::new(secret.clone(), ours, theirs);
    if !session.verify_coordinator(&challenge.proof) {
        return Err(Error::Secret(address.to_owned()));
    }
    let order = order.encode();
    let proof = session.order_proof(&order);
    send(&up, Up::Order(ProvenOrder { order, proof })).await;
    receive(&mut down).await.map_err(failed)?.ok_or(Error::Protocol("no answer to an order"))
}

/// If the stream has ended, that shows on the way down.
async fn send(up: &mpsc::Sender<OperatorMessage>, message: Up) {
    let _ = up.send(OperatorMessage { message: Some(message) }).await;
}

async fn receive(down: &mut Streaming<OperatorReply>) -> Result<Option<Down>, Status> {
    Ok(down.message().await?.and_then(|reply| reply.message))
}
