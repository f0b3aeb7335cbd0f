//! A worker that computes on a GPU.

use std::future::Future;

use comm::CollectiveChoice;
use kernels::CudaOptions;

use crate::{WorkerConfig, WorkerError};

#[cfg(feature = "cuda")]
pub(crate) use self::built_in::run;

/// Not built in.
#[cfg(not(feature = "cuda"))]
pub(crate) async fn run(
    _: WorkerConfig,
    _: CudaOptions,
    _: CollectiveChoice,
    _: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    kernels::gpus().map(drop).map_err(WorkerError::Device)
}

#[cfg(feature = "cuda")]
mod built_in {
    use cluster::doctor::Library;
    use cluster::{Assignment, Part};
    use comm::cuda::{ConnectOptions, connect, connect_stages};
    use comm::{AbortHandle, Collective};
    use kernels::Cuda;
    use kernels::cuda::Buffer;
    use model::{Held, Loaded, ModelExecutor, Stage};
    use tracing::{info, warn};

    use super::*;
    use crate::load::{Connections, FORM_LIMIT, Load, Site, ranges, stage};
    use crate::{STAGE, identity, serve_until};

    /// What a GPU needs, with the versions that are here.
    fn libraries() -> Vec<Library> {
        let library = |(name, version): (&str, String)| Library { name: name.to_owned(), version };
        kernels::cuda::libraries().into_iter().map(library).collect()
    }

    /// Shares on a GPU; ranks over what connects the GPUs.
    struct CudaLoad {
        site: Site,
        options: CudaOptions,
        collective: CollectiveChoice,
        announce: fn(&str),
    }

    /// Serves until `shutdown`; see [`crate::run`].
    pub(crate) async fn run(
        config: WorkerConfig,
        options: CudaOptions,
        collective: CollectiveChoice,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), WorkerError> {
        // Opened here for its errors and its kernels, which are compiled now; the executor thread opens it again when it has a share to load.
        let gpu = Cuda::open(options.clone()).map_err(WorkerError::Device)?;
        info!(target: STAGE, "device opened");
        let (free, total) = gpu.memory().map_err(WorkerError::Device)?;
        info!(gpu = gpu.name().map_err(WorkerError::Device)?, free, total, "found");
        if let Some(warning) = gpu.warning() {
            warn!("{warning}");
        }
        let site = Site::open(&config, &gpu)?;
        drop(gpu);
        let announce = config.announce;
        let identity = identity(config, &site, libraries()).await?;
        let faults = site.faults.clone();
        serve_until(&identity, CudaLoad { site, options, collective, announce }, faults, shutdown).await
    }

    impl Load for CudaLoad {
        type Connections = Connections;
        type Held = Held<Cuda>;
        type Formed = (Box<dyn Collective<Buffer>>, Stage<Buffer>);
        type Executor = ModelExecutor<Cuda, Box<dyn Collective<Buffer>>>;

        fn connect(&self, assignment: &Assignment, abort: AbortHandle) -> Result<Connections, model::Error> {
            self.site.form(assignment, abort)
        }

        fn open(&self) -> Result<Self::Held, model::Error> {
            Ok(Held::new(Cuda::open(self.options.clone())?))
        }

        fn load(
            &self,
            assignment: &Assignment,
            (transport, neighbours): Connections,
            abort: &AbortHandle,
            held: &mut Self::Held,
        ) -> Result<(Self::Formed, Loaded), model::Error> {
            let options = ConnectOptions {
                choice: self.collective,
                deterministic: self.options.deterministic,
                limit: FORM_LIMIT,
            };
            let collective = connect(held.backend(), transport, ranges(assignment), options)?;
            let stage = stage(assignment, connect_stages(held.backend(), neighbours, options)?);
            info!(target: STAGE, "connected");
            let loaded = self.site.load(assignment, &stage, abort, held)?;
            Ok(((collective, stage), loaded))
        }

        fn prepare(
            &self,
            part: &Part,
            abort: &AbortHandle,
            held: &mut Self::Held,
        ) -> Result<Loaded, model::Error> {
            self.site.prepare(part, abort, held)
        }

        fn start(
            &self,
            assignment: &Assignment,
            (collective, stage): Self::Formed,
            held: Self::Held,
        ) -> Result<Self::Executor, model::Error> {
            let mut executor = self.site.source.start(held, stage, &ranges(assignment), collective)?;
            executor.backend_mut().synchronize()?;
            info!(target: STAGE, "weights loaded");
            let gpu = executor.backend_mut();
            let (stage, rank, ordinal) = (assignment.stage, assignment.rank, self.options.ordinal);
            (self.announce)(&format!(
                "rank {rank} of stage {stage} on cuda:{ordinal}, {}: {}",
                gpu.name()?,
                gpu.memory_report()?
            ));
            Ok(executor)
        }

        fn leave(&self, executor: Self::Executor) -> Result<Self::Held, model::Error> {
            executor.leave()
        }
    }
}
