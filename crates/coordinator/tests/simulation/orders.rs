//! What an operator orders while all this happens, and takes back later.

use std::sync::Arc;
use std::time::Duration;

use auth::{Nonce, Secret};
use cluster::proof::nonce;
use cluster::proto::cluster_client::ClusterClient;
use cluster::proto::operator_message::Message as Up;
use cluster::proto::operator_reply::Message as Down;
use cluster::proto::{OperatorHello, OperatorMessage, OperatorReply, ProvenOrder};
use cluster::{Order, PROTOCOL, Session, Shape};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::network::Service;
use crate::world::World;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy)]
pub(crate) enum Wish {
    /// A worker is to have no part.
    Drain(usize),
    /// Groups are to be cut otherwise, and to be so many.
    Scale(Shape, usize),
}

impl Wish {
    pub(crate) async fn happen(self, world: &Arc<World>, time: Duration) {
        let policy = world.scenario.policy;
        let (order, back) = match self {
            Self::Drain(worker) => {
                let address = World::address(worker);
                (Order::Drain { address: address.clone() }, Order::Restore { address })
            }
            Self::Scale(shape, replicas) => (
                Order::Scale { shape: Some(shape), replicas: Some(replicas) },
                Order::Scale { shape: Some(policy.shape), replicas: Some(policy.replicas) },
            ),
        };
        // What was refused needs not be taken back.
        let Answer { yes, unclear, .. } = give(world, order).await;
        if yes || unclear {
            sleep(time).await;
            loop {
                let Answer { yes, put_down, .. } = give(world, back.clone()).await;
                // The policy of the beginning may have too few workers now, but not for ever.
                if put_down && (yes || matches!(back, Order::Restore { .. })) {
                    return;
                }
                sleep(PAUSE).await;
            }
        }
    }
}

/// What came of an order.
struct Answer {
    yes: bool,
    /// Somebody else did not answer, and may have carried it out.
    unclear: bool,
    /// Whoever leads next knows how things stand.
    put_down: bool,
}

/// Gives an order to whoever leads, until one says yes or no.
async fn give(world: &Arc<World>, order: Order) -> Answer {
    let put_down = |said: &str| !said.contains("may not know how things stand");
    let mut unclear = false;
    loop {
        if let Some(leader) = world.coordinators.leader()
            && let Some(service) =
                world.coordinators.at(leader).and_then(|site| world.network.service(&site.name))
        {
            match operate(service, world.secret(), &order).await {
                Ok(done) => {
                    world.journal.note(format_args!("{done}"));
                    return Answer { yes: true, unclear, put_down: put_down(&done) };
                }
                Err(status) if status.code() == Code::FailedPrecondition => {
                    world.journal.note(format_args!("refused: {}", status.message()));
                    return Answer { yes: false, unclear, put_down: put_down(status.message()) };
                }
                Err(_) => unclear = true,
            }
        }
        sleep(PAUSE).await;
    }
}

async fn operate(service: Service, secret: &Secret, order: &Order) -> Result<String, Status> {
    let (up, messages) = mpsc::unbounded_channel();
    let send = |message| {
        let _ = up.send(OperatorMessage { message: Some(message) });
    };
    let ours = Nonce::random();
    send(Up::Hello(OperatorHello { protocol: PROTOCOL, nonce: ours.0.to_vec().into() }));
    let messages = UnboundedReceiverStream::new(messages);
    let mut down = ClusterClient::new(service).operate(messages).await?.into_inner();
    let Down::Challenge(challenge) = receive(&mut down).await? else {
        return Err(Status::internal("no challenge"));
    };
    let theirs = nonce("nonce", &challenge.nonce).map_err(|error| Status::internal(error.to_string()))?;
    let session = Session::new(secret.clone(), ours, theirs);
    let order = order.encode();
    let proof = session.order_proof(&order);
    send(Up::Order(ProvenOrder { order, proof }));
    match receive(&mut down).await? {
        Down::Done(done) => Ok(done),
        other => Err(Status::internal(format!("an answer to something else: {other:?}"))),
    }
}

async fn receive(down: &mut Streaming<OperatorReply>) -> Result<Down, Status> {
    let reply = down.message().await?.and_then(|reply| reply.message);
    reply.ok_or_else(|| Status::unavailable("the stream ended"))
}
