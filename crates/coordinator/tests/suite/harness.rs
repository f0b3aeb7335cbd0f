//! A coordinator on a loopback socket that fake workers join.

use std::net::SocketAddr;

use auth::Secret;
use coordinator::{Coordinator, CoordinatorConfig, CoordinatorHandle, Engine, State, Submission};
use engine::{Request, SamplingParams};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::fake::Fake;

pub(crate) struct Cluster {
    pub(crate) handle: CoordinatorHandle,
    pub(crate) address: SocketAddr,
    pub(crate) secret: Secret,
}

impl Cluster {
    /// Of one group of `ranks` ranks, but for what `change` does.
    pub(crate) async fn start(ranks: usize, change: impl FnOnce(&mut CoordinatorConfig)) -> Self {
        let secret = Secret::random();
        let mut config = CoordinatorConfig::new(ranks, secret.clone());
        change(&mut config);
        let (handle, service) = Coordinator::start(config, 1, CancellationToken::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let server = Server::builder().add_service(service.into_server());
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { handle, address, secret }
    }

    /// A worker that behaves; its port is its name.
    pub(crate) fn fake(&self, port: u16) -> Fake {
        Fake::new(&self.secret, &format!("127.0.0.1:{port}"))
    }

    pub(crate) async fn until(&self, wanted: impl Fn(&State) -> bool) -> State {
        let mut state = self.handle.state();
        state.wait_for(wanted).await.expect("the coordinator runs").clone()
    }

    pub(crate) async fn serving(&self) {
        self.until(|state| matches!(state, State::Serving(_))).await;
    }

    pub(crate) async fn submit(&self, prompt: &[u32], max_tokens: u32) -> Submission {
        self.handle.submit(request(prompt, max_tokens)).await.expect("it is served")
    }
}

/// What the most likely tokens are asked for with.
pub(crate) fn request(prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: SamplingParams::GREEDY,
        stop_ids: vec![],
        resume: None,
    }
}
