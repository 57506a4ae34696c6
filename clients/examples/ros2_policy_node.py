"""UNTESTED TEMPLATE of a ROS 2 node: nothing of this file has ever run on a ROS 2 installation.

A policy moves joints: `JointState` in, a `ControlLoop` in the middle, `Float64MultiArray` out, at a fixed rate. What is
checked is that the file compiles and that it uses `lom_client` as it is. Read every line, adapt the observation, the
limits and the fallback to your robot, and try it without power first. This is not a certified safety function.

    python ros2_policy_node.py --ros-args -p target:=grpc://10.0.0.5:8001 -p joints:="['hip', 'knee']" \
        -p kind:=velocity -p slew_per_s:=2.0

SAFE_STOP stays until an operator calls the service `~/rearm` (std_srvs/Trigger); `~/stop` brings it about.
"""

import numpy as np
import rclpy  # type: ignore[import-not-found]
from numpy.typing import NDArray
from rclpy.node import Node  # type: ignore[import-not-found]
from rclpy.qos import qos_profile_sensor_data  # type: ignore[import-not-found]
from sensor_msgs.msg import JointState  # type: ignore[import-not-found]
from std_msgs.msg import Float64MultiArray  # type: ignore[import-not-found]
from std_srvs.srv import Trigger  # type: ignore[import-not-found]

from lom_client import ControlLoop, Level, LevelChanged, LoopConfig, LoopEvent, PolicyClient


class PolicyNode(Node):  # type: ignore[misc]
    """Parameters: target, joints, rate_hz, kind, slew_per_s, safe_action, max_sensor_age_s."""

    def __init__(self) -> None:
        super().__init__("lom_policy")
        target = self.declare_parameter("target", "grpc://127.0.0.1:8001").value
        self._joints: list[str] = self.declare_parameter("joints", ["joint_1"]).value
        rate_hz = self.declare_parameter("rate_hz", 50.0).value
        kind = self.declare_parameter("kind", "velocity").value
        slew_per_s = self.declare_parameter("slew_per_s", 1.0).value
        safe_action = self.declare_parameter("safe_action", [0.0] * len(self._joints)).value
        max_sensor_age_s = self.declare_parameter("max_sensor_age_s", 0.1).value

        self._max_sensor_age_ns = round(max_sensor_age_s * 1e9)
        self._positions = self._velocities = np.full(len(self._joints), np.nan)
        self._sensed_ns = 0
        self._client = PolicyClient(target)
        config = LoopConfig(
            period_s=1 / rate_hz,
            kinds=kind,
            safe_action=safe_action,
            slew_per_s=slew_per_s,
            deadline_s=0.0,  # take what is there: a callback that waits holds up every other one
        )
        self._loop = ControlLoop(self._client, config, on_event=self._tell)

        self._commands = self.create_publisher(Float64MultiArray, "~/commands", 1)
        self.create_subscription(JointState, "joint_states", self._sense, qos_profile_sensor_data)
        self.create_service(Trigger, "~/rearm", self._rearm)
        self.create_service(Trigger, "~/stop", self._stop)
        self.create_timer(1 / rate_hz, self._tick)

    def destroy_node(self) -> None:
        """The robot's own watchdog has to notice that no command comes any more."""
        self._loop.close()
        self._client.close()
        super().destroy_node()

    def _sense(self, message: JointState) -> None:
        order = [message.name.index(joint) for joint in self._joints if joint in message.name]
        if len(order) != len(self._joints):
            self.get_logger().warning(f"joint_states lacks some of {self._joints}", throttle_duration_sec=1.0)
            return
        self._positions = np.array(message.position)[order]
        self._velocities = np.array(message.velocity)[order] if message.velocity else np.zeros(len(order))
        self._sensed_ns = self.get_clock().now().nanoseconds

    def _tick(self) -> None:
        action = self._loop.step(self._observation(), measured=self._measured())
        self._commands.publish(Float64MultiArray(data=action.values.tolist()))
        if action.level is Level.SAFE_STOP:
            self.get_logger().error(f"SAFE_STOP: {action.reason} {action.detail}", throttle_duration_sec=1.0)

    def _observation(self) -> NDArray[np.float64]:
        """As the policy was trained on it; adapt this. NaN where the sensors are old: the loop counts it as a miss."""
        observation = np.concatenate([self._positions, self._velocities])
        is_old = self.get_clock().now().nanoseconds - self._sensed_ns > self._max_sensor_age_ns
        return np.full_like(observation, np.nan) if is_old else observation

    def _measured(self) -> NDArray[np.float64]:
        """What the joints really do, in the units of the action; adapt this to the kind."""
        return self._velocities

    def _tell(self, event: LoopEvent) -> None:
        """Called in a thread of its own."""
        if isinstance(event, LevelChanged):
            self.get_logger().info(f"{event.before} -> {event.after} {event.reason}")

    def _rearm(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.message = self._loop.rearm()
        response.success = not response.message
        return response

    def _stop(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._loop.operator_stop()
        response.success = True
        return response


def main() -> None:
    """Spins until it is interrupted."""
    rclpy.init()
    node = PolicyNode()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
