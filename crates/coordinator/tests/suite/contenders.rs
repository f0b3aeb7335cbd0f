//! Several coordinators over one registry, with fake workers: one leads, the others stand by, and terms fence.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use auth::Secret;
use cluster::registry::election::{Addresses, Candidate, Election};
use cluster::registry::orders::OrderBook;
use cluster::registry::{ClusterName, MemoryRegistry, Registry, Transaction};
use coordinator::{Contender, CoordinatorConfig, Engine, EngineError, EngineEvent, State, Submission};
use engine::{Request, StepPlan};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Server;

use crate::fake::{Fake, continuation};
use crate::harness;

const PROMPT: &[u32] = &[11, 22, 33];
const TTL: Duration = Duration::from_secs(5);

/// A coordinator, and how to end it.
struct Running {
    contender: Contender,
    workers: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(registry: &MemoryRegistry, secret: &Secret, name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let workers = listener.local_addr().expect("an address");
        let registry: Arc<dyn Registry> = Arc::new(registry.clone());
        let election = Election::watch(registry.as_ref()).await.expect("it answers");
        let addresses = Addresses { clients: format!("{name}:1"), workers: workers.to_string() };
        let book = OrderBook::new(registry.clone());
        let candidate = Candidate::new(registry, addresses, TTL);
        let stop = CancellationToken::new();
        let config = CoordinatorConfig::new(1, secret.clone());
        let (contender, service, task) = Contender::start(config, candidate, election, book, stop.clone());
        let server = Server::builder().add_service(service.into_server());
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { contender, workers, stop, task }
    }

    async fn until(&self, wanted: impl Fn(&State) -> bool) -> State {
        self.contender.state().wait_for(wanted).await.expect("it runs").clone()
    }

    async fn resign(self) {
        self.stop.cancel();
        self.task.await.expect("no panic");
    }
}

fn request(max_tokens: u32) -> Request {
    harness::request(PROMPT, max_tokens)
}

async fn next(submission: &mut Submission) -> EngineEvent {
    submission.events.recv().await.expect("an event")
}

async fn tokens(submission: &mut Submission, count: usize) -> Vec<u32> {
    let mut tokens = Vec::new();
    while tokens.len() < count {
        match next(submission).await {
            EngineEvent::Token { id, .. } => tokens.push(id),
            other => panic!("{other:?} after {} tokens", tokens.len()),
        }
    }
    tokens
}

fn registry() -> MemoryRegistry {
    MemoryRegistry::new(&"test".parse::<ClusterName>().expect("a name"))
}

/// The plans that a worker gets.
fn plans() -> (mpsc::UnboundedSender<StepPlan>, mpsc::UnboundedReceiver<StepPlan>) {
    mpsc::unbounded_channel()
}

#[tokio::test]
async fn one_leads_the_other_stands_by_and_takes_over() {
    let (registry, secret) = (registry(), Secret::random());
    let first = Running::start(&registry, &secret, "first").await;
    first.until(|state| matches!(state, State::Waiting { .. })).await;
    let second = Running::start(&registry, &secret, "second").await;
    let standby = second.until(|state| matches!(state, State::Standby(Some(_)))).await;
    assert_eq!(standby.to_string(), "standing by: the leader is at first:1");

    // Who stands by serves neither clients nor workers, and says who does.
    let elsewhere = EngineError::Standby(Some("first:1".into()));
    assert_eq!(elsewhere.to_string(), "this coordinator stands by: the leader is at first:1");
    assert_eq!(second.contender.model(), Err(elsewhere.clone()));
    assert_eq!(second.contender.submit(request(1)).await.expect_err("it stands by"), elsewhere);
    let refused = Fake::new(&secret, "127.0.0.1:1").start(second.workers).end().await;
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, elsewhere.to_string().as_str()));

    let (sender, mut seen) = plans();
    // It answers ten steps, so the request is under way for as long as the first one leads.
    let worker = Fake { plans: Some(sender), hold_from: Some(10), ..Fake::new(&secret, "127.0.0.1:1") };
    let worker = worker.start(first.workers);
    first.until(|state| matches!(state, State::Serving(_))).await;
    let mut submission = first.contender.submit(request(40)).await.expect("it leads");
    let answered = tokens(&mut submission, 10).await;
    assert_eq!(answered, continuation(PROMPT, 40)[..10]);
    first.resign().await;
    let lost =
        EngineEvent::Failed(EngineError::Unavailable("this coordinator does not lead any more".into()));
    assert_eq!(next(&mut submission).await, lost);
    let sent_away = worker.end().await;
    assert_eq!(
        (sent_away.code(), sent_away.message()),
        (Code::Aborted, "this coordinator does not lead any more")
    );

    second.until(|state| matches!(state, State::Waiting { .. })).await;
    let (sender, mut seen_later) = plans();
    let worker = Fake { plans: Some(sender), ..Fake::new(&secret, "127.0.0.1:1") };
    let _worker = worker.start(second.workers);
    second.until(|state| matches!(state, State::Serving(_))).await;
    let resumed = Request { resume: Some(answered), ..request(40) };
    let mut submission = second.contender.submit(resumed).await.expect("it leads");
    assert_eq!(tokens(&mut submission, 30).await, continuation(PROMPT, 40)[10..]);
    let term =
        async |plans: &mut mpsc::UnboundedReceiver<StepPlan>| plans.recv().await.expect("a plan").epoch.term;
    assert!(term(&mut seen_later).await > term(&mut seen).await, "a later term fences an earlier one");
}

#[tokio::test]
async fn a_leader_that_was_superseded_plans_nothing_more() {
    let (registry, secret) = (registry(), Secret::random());
    let old = Running::start(&registry, &secret, "old").await;
    let (sender, mut seen) = plans();
    let worker = Fake { plans: Some(sender), ..Fake::new(&secret, "127.0.0.1:1") };
    old.until(|state| matches!(state, State::Waiting { .. })).await;
    let worker = worker.start(old.workers);
    old.until(|state| matches!(state, State::Serving(_))).await;
    let mut submission = old.contender.submit(request(300)).await.expect("it leads");
    tokens(&mut submission, 1).await;
    let term = seen.recv().await.expect("a plan").epoch.term + 1;

    // The registry tells of another, with a higher term.
    let lease = registry.lease(TTL).await.expect("it answers");
    let leader =
        format!("{{\"term\": {term}, \"candidate\": \"x\", \"clients\": \"new:1\", \"workers\": \"new:2\"}}");
    let elect = Transaction::default().put("election/leader", leader.into(), Some(lease.id())).put(
        "election/term",
        format!("{{\"term\": {term}, \"resigned\": false}}").into(),
        None,
    );
    registry.transact(elect).await.expect("it answers");
    old.until(|state| *state == State::Standby(Some("new:1".into()))).await;
    let end = worker.end().await;
    assert_eq!(end.code(), Code::Aborted);
    let mut last = next(&mut submission).await;
    while let EngineEvent::Token { .. } = last {
        last = next(&mut submission).await;
    }
    assert!(matches!(last, EngineEvent::Failed(EngineError::Unavailable(_))), "{last:?}");
    while let Some(plan) = seen.recv().await {
        assert!(plan.epoch.term < term);
    }
}
